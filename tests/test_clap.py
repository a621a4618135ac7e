"""CLAP: its features, loss, files, and one real training run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from stable_audio_lite.bundle import load_part
from stable_audio_lite.clap.mel import SAMPLE_RATE, log_mel, repeat_pad
from stable_audio_lite.clap.model import (
    UNKNOWN_TOKEN,
    Clap,
    ClapConfig,
    config_from_transformers,
    load_tokenizer,
    retrieval,
    tokenize,
    transformers_config,
)
from stable_audio_lite.clap.text import TextEncoder, in_text_encoder, load_whole_clap
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.config import from_dict, load_config, to_dict
from stable_audio_lite.errors import UserError
from training.task import OptimizerConfig, RunConfig
from training.train_clap import ClapTask, TrainClapConfig, run

CAPTIONS = ["a low hum", "a high whistle"]
SIZES = {
    "vocab_size": 280,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 2,
    "text_feed_forward": 64,
    "text_positions": 18,
    "max_tokens": 16,
    "audio_width": 8,
    "audio_patch": 8,
    "audio_depths": (1, 1),
    "audio_heads": (1, 2),
    "audio_fusion": False,
    "embedding": 16,
}


def sounds(seconds: float = 2.0) -> torch.Tensor:
    """A low and a high tone (2, T) at 48 kHz."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in (110.0, 3000.0)])


@pytest.fixture
def clap():
    torch.manual_seed(0)
    return Clap(ClapConfig(**SIZES), train_tokenizer(CAPTIONS * 3, 280)).eval()


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("seconds", [1.7, 6.0, 10.0])
def test_mels_equal_the_published_feature_extractor(fusion, seconds):
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="fusion" if fusion else "rand_trunc")
    waveform = torch.randn(int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0)) * 0.1
    theirs = extractor(waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features[0, 0]
    ours = log_mel(repeat_pad(waveform), fusion=fusion)
    assert ours.shape == theirs.shape == (1001, 64)
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-2)


def test_paper_size_is_laions():
    from transformers import ClapConfig as HubConfig

    ours = transformers_config(ClapConfig())
    theirs = HubConfig(audio_config={"enable_fusion": True, "fusion_type": "aff_2d"})
    for tower in ("text_config", "audio_config"):
        mine, other = getattr(ours, tower).to_dict(), getattr(theirs, tower).to_dict()
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in mine.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in other.items()
        }
    assert config_from_transformers(theirs.to_dict()) == ClapConfig()


def test_config_goes_through_yaml_and_names_mistakes():
    config = ClapConfig(**SIZES)
    assert from_dict(ClapConfig, to_dict(config), "file") == config
    for key, value in {
        "text_layers": 1,
        "text_heads": 3,
        "text_feed_forward": -1,
        "audio_patch": 0,
        "text_positions": 17,
        "audio_window": 64,
        "audio_heads": [3, 2],
    }.items():
        with pytest.raises(UserError, match=f"file: .*{key}|file: .*image_size"):
            from_dict(ClapConfig, to_dict(config) | {key: value}, "file")


def test_saved_folder_loads_in_transformers_and_here(clap, tmp_path):
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    clap.save(tmp_path / "clap")
    theirs = ClapModel.from_pretrained(tmp_path / "clap").eval()
    ids, mask = tokenize(clap.tokenizer, CAPTIONS, 16)
    their_ids = AutoTokenizer.from_pretrained(tmp_path / "clap")(CAPTIONS, padding="max_length", max_length=16)
    assert their_ids["input_ids"] == ids.tolist()
    features = ClapFeatureExtractor.from_pretrained(tmp_path / "clap")
    mels = features(list(sounds().numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        output = theirs(ids, mels.input_features.float(), mels.is_longer, attention_mask=mask.long())
    torch.testing.assert_close(clap.embed_text(CAPTIONS), output.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(clap.embed_audio(sounds()), output.audio_embeds, rtol=0, atol=1e-3)

    again = Clap.load(tmp_path / "clap")
    assert again.config == clap.config
    assert torch.equal(again.embed_text(CAPTIONS), clap.embed_text(CAPTIONS))
    assert torch.equal(again.embed_audio(sounds()), clap.embed_audio(sounds()))
    encoder = TextEncoder.from_transformers(tmp_path / "clap")
    assert torch.equal(encoder.encode(CAPTIONS).tokens, TextEncoder.from_clap(clap).encode(CAPTIONS).tokens)


@pytest.mark.parametrize("seconds", [0.5, 10.0, 23.0])
@pytest.mark.parametrize("fusion", [False, True])
def test_sounds_of_any_length_and_rate(clap, seconds, fusion):
    clap = Clap(ClapConfig(**SIZES | {"audio_fusion": fusion}), clap.tokenizer).eval()
    stereo = sounds(seconds)[:, None].expand(-1, 2, -1)
    embedding = clap.embed_audio(stereo)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(2))
    low_rate = clap.embed_audio(stereo[..., ::2], SAMPLE_RATE // 2)
    assert torch.nn.functional.cosine_similarity(embedding, low_rate).min() > 0.98
    with pytest.raises(ValueError, match="no samples"):
        clap.embed_audio(torch.zeros(1, 0))


def test_loss_is_symmetric_and_its_limits_are_right(clap):
    text = torch.eye(4, 16)
    audio = text.roll(1, 0)
    scale = clap.scales[0].exp().item()
    matched = -torch.log_softmax(torch.tensor([scale, 0.0, 0.0, 0.0]), 0)[0]
    torch.testing.assert_close(clap.loss(text, text), matched)
    mixed = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    torch.testing.assert_close(clap.loss(text, mixed), clap.loss(mixed, text))
    assert clap.loss(text, audio) > 1
    with torch.no_grad():
        clap.scales[0].fill_(50.0)  # e^50, which the cap turns into 100
    assert clap.loss(text, audio) < 101


def test_loss_falls_on_two_pairs(clap):
    clap.train()
    ids, mask = tokenize(clap.tokenizer, CAPTIONS, 16)
    mels = torch.stack([clap.features(s) for s in sounds()])
    optimizer = torch.optim.AdamW(clap.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = clap.loss(*clap(ids, mask, mels, torch.zeros(2, dtype=torch.bool))[:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    clap.eval()
    assert (clap.embed_audio(sounds()) @ clap.embed_text(CAPTIONS).T).argmax(1).tolist() == [0, 1]


def test_retrieval_counts():
    vectors = torch.eye(20)
    assert set(retrieval(vectors, vectors).values()) == {100.0}
    shifted = retrieval(vectors, 0.5 * vectors + vectors.roll(1, 0))
    assert shifted["text_to_audio/R@1"] == 0 and shifted["audio_to_text/R@10"] == 100


def test_ranks_do_not_favour_a_clap_that_says_nothing():
    """Where all embeddings agree, every match is last among equals."""
    same = torch.ones(20, 4)
    assert set(retrieval(same, same).values()) == {0.0}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for i, seconds in enumerate((1.0, 10.0, 12.0)):
        soundfile.write(folder / f"{i}.wav", np.tile(sounds(seconds)[i % 2].numpy()[:, None], 2), SAMPLE_RATE)
        rows.append({"file_name": f"{i}.wav", "captions": [CAPTIONS[i % 2], f"{CAPTIONS[i % 2]} again"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_training_writes_a_bundle_and_resumes(corpus, tmp_path):
    config = TrainClapConfig(
        model="configs/stable_audio/tiny.yaml",
        data=(str(corpus),),
        held_out=str(corpus),
        batch_size=2,
        run=RunConfig(output=str(tmp_path / "run"), steps=2, evaluate_every=2, checkpoint_every=1, tracker="none"),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    bundle = run(config)
    rows = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    recalls = [row["held_out/text_to_audio/R@10"] for row in rows if "held_out/text_to_audio/R@10" in row]
    assert recalls == [100.0]  # there are but three items
    model = load_config("configs/stable_audio/tiny.yaml", type(load_bundle_config(bundle)))
    encoder = TextEncoder(model.clap, load_tokenizer(bundle / "tokenizer.json"))
    load_part(bundle, "text_encoder", encoder)
    expected = TextEncoder.from_transformers(tmp_path / "run/transformers").encode(CAPTIONS)
    torch.testing.assert_close(encoder.encode(CAPTIONS).tokens, expected.tokens)
    assert run(config) == bundle


def test_text_features_stay_where_they_are_asked_to(corpus, tmp_path):
    """The audio tower goes on from a bundle; what a U-Net sees of a prompt is the same to the bit."""
    settings = {
        "model": "configs/stable_audio/tiny.yaml",
        "data": (str(corpus),),
        "batch_size": 3,
        "optimizer": OptimizerConfig(lr=1e-2),
    }
    run_config = RunConfig(output=str(tmp_path / "first"), steps=1, tracker="none")
    first = run(TrainClapConfig(run=run_config, **settings))
    again = replace(run_config, output=str(tmp_path / "again"), steps=2)
    second = run(TrainClapConfig(run=again, initial=str(first), freeze_text=True, **settings))
    before, after = (load_file(folder / "text_encoder.safetensors") for folder in (first, second))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    whole, changed = (load_whole_clap(folder) for folder in (first, second))
    assert not torch.equal(whole.embed_text(CAPTIONS), changed.embed_text(CAPTIONS))  # by its last layer
    assert not torch.equal(whole.embed_audio(sounds()), changed.embed_audio(sounds()))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    (first / "audio_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="no audio_encoder"):
        run(TrainClapConfig(run=replace(again, output=str(tmp_path / "x")), initial=str(first), **settings))
    with pytest.raises(ValueError, match="freeze_text needs initial"):
        TrainClapConfig(run=again, freeze_text=True, **settings)


def test_main_captions_are_drawn_as_often_as_asked(corpus, tmp_path):
    settings = {
        "model": "configs/stable_audio/tiny.yaml",
        "data": (str(corpus),),
        "batch_size": 3,
        "optimizer": OptimizerConfig(lr=1e-3),
        "run": RunConfig(output=str(tmp_path / "run"), steps=1, tracker="none"),
    }
    shares = {}
    for main in (0.0, 0.5, 1.0):
        task = ClapTask(TrainClapConfig(main_caption=main, **settings))
        again = task.tokenizer.token_to_id("Ġagain")
        assert again is not None  # the captions that aren't the main one have this word
        found = [(task.batch(number, 0, 1)["ids"] == again).any(1) for number in range(60)]
        shares[main] = 1 - float(torch.cat(found).float().mean())
    assert shares[1.0] == 1 and 0.4 < shares[0.0] < 0.6 and 0.67 < shares[0.5] < 0.83
    with pytest.raises(ValueError, match="main_caption must lie in 0..1"):
        TrainClapConfig(main_caption=1.5, **settings)


def test_a_fusion_model_trains_on_long_and_short_sounds(corpus, tmp_path):
    model = yaml.safe_load(Path("configs/stable_audio/tiny.yaml").read_text())
    model["clap"]["audio_fusion"] = True
    (tmp_path / "fusion.yaml").write_text(yaml.safe_dump(model))
    task = ClapTask(
        TrainClapConfig(
            model=str(tmp_path / "fusion.yaml"),
            data=(str(corpus),),
            batch_size=3,
            run=RunConfig(output=str(tmp_path / "run"), steps=1, tracker="none"),
            optimizer=OptimizerConfig(lr=1e-3),
        )
    )
    batch = task.batch(0, 0, 1)
    assert batch["mels"].shape == (3, 4, 1001, 64) and batch["longer"].sum() >= 2
    assert all(torch.equal(v, task.batch(0, 0, 1)[k]) for k, v in batch.items())
    clap = task.modules["clap"]
    clap.loss(*clap(**batch)[:2]).backward()
    assert all(p.grad is not None for p in clap.parameters())


def test_the_language_model_reads_the_layer_that_generators_read(corpus, tmp_path):
    """Its loss is 0 for features that point at their tokens; it reaches that layer and all below, and nothing else."""
    settings = {"model": "configs/stable_audio/tiny.yaml", "data": (str(corpus),), "batch_size": 3}
    run_config = RunConfig(output=str(tmp_path / "run"), steps=1, tracker="none")
    config = TrainClapConfig(
        run=run_config, optimizer=OptimizerConfig(lr=1e-3), language=1.0, corrupted=0.5, **settings
    )
    task = ClapTask(config)
    batch = task.batch(0, 0, 1)
    ids, corrupted = batch["ids"], batch["corrupted"]
    guessed = (corrupted != ids)[batch["mask"]]
    assert 0.2 < float(guessed.float().mean()) < 0.8
    assert bool((corrupted[corrupted != ids] == UNKNOWN_TOKEN).all())
    clap = task.modules["clap"]
    _, _, loss = clap(**batch)
    assert float(loss.detach()) == pytest.approx(math.log(clap.config.vocab_size), rel=0.2)  # knows nothing yet
    loss.backward()
    reached = {name for name, p in clap.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached and all(in_text_encoder(name, clap.config) for name in reached)
    layers = clap.model.text_model.encoder.layer
    assert all(any(f"layer.{n}." in name for name in reached) for n in range(len(layers) - 1))


def load_bundle_config(bundle):
    from stable_audio_lite.systems import StableAudioConfig

    return load_config(bundle / "config.yaml", StableAudioConfig)


def test_too_few_items_and_captions_are_named(corpus, tmp_path):
    settings = {
        "model": "configs/stable_audio/tiny.yaml",
        "data": (str(corpus),),
        "batch_size": 4,
        "run": RunConfig(output=str(tmp_path / "run"), steps=1, tracker="none"),
        "optimizer": OptimizerConfig(lr=1e-3),
    }
    with pytest.raises(UserError, match="batch_size"):
        run(TrainClapConfig(**settings))
    (corpus / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="no item has a caption"):
        run(TrainClapConfig(**settings))
