"""Training of a CLAP: real runs on three short sounds, and what its batches hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from small_clap import tones

from stable_audio_lite.clap.checkpoints import load_clap, load_text_encoder, text_encoder_name
from stable_audio_lite.clap.mel import SAMPLE_RATE
from stable_audio_lite.clap.tokenizer import UNKNOWN_TOKEN, load_tokenizer
from stable_audio_lite.errors import UserError
from training.loop import fit
from training.task import OptimizerConfig, RunConfig
from training.train_clap import ClapTask, TrainClapConfig, run

CAPTIONS = ["a low hum", "a high whistle"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = []
    for i, seconds in enumerate((1.0, 10.0, 12.0)):
        soundfile.write(folder / f"{i}.wav", np.tile(tones(seconds)[i % 2].numpy()[:, None], 2), SAMPLE_RATE)
        rows.append({"file_name": f"{i}.wav", "captions": [CAPTIONS[i % 2], f"{CAPTIONS[i % 2]} again"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(corpus: Path, output: Path, steps: int = 1, **more: Any) -> TrainClapConfig:
    run_settings = {"output": str(output), "steps": steps, "tracker": "none"} | more.pop("run", {})
    given = {"model": "configs/stable_audio/tiny.yaml", "batch_size": 3, "optimizer": OptimizerConfig(lr=1e-3)} | more
    return TrainClapConfig(data=(str(corpus),), run=RunConfig(**run_settings), **given)


def test_training_writes_a_bundle_and_resumes(corpus, tmp_path):
    often = {"evaluate_every": 2, "checkpoint_every": 1}
    config = settings(corpus, tmp_path / "run", 2, held_out=str(corpus), batch_size=2, run=often)
    bundle = run(config)
    rows = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    recalls = [row["held_out/text_to_audio/R@10"] for row in rows if "held_out/text_to_audio/R@10" in row]
    assert recalls == [100.0]  # there are but three items
    encoders = [load_text_encoder(folder) for folder in (bundle, tmp_path / "run/transformers")]
    assert torch.equal(*(encoder.encode(CAPTIONS).tokens for encoder in encoders))
    assert run(config) == bundle


def test_a_run_keeps_its_tokenizer(corpus, tmp_path):
    """Whatever the captions become: tokens, and the embedding of a caption, are those of the first start."""
    first = run(settings(corpus, tmp_path / "run"))
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"captions": [f"violins and violas whistle number {i}"]} for i, row in enumerate(rows)]
    before = (first / "tokenizer.json").read_text(), load_text_encoder(first).encode(CAPTIONS).tokens
    (corpus / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    goes_on = settings(corpus, tmp_path / "run", 2, optimizer=OptimizerConfig(lr=1e-12))
    task = ClapTask(goes_on)
    new = task.tokenizer.get_vocab()
    fit(goes_on.run, task, goes_on)
    assert task.tokenizer.get_vocab() == load_tokenizer(first / "tokenizer.json").get_vocab() != new
    assert (first / "tokenizer.json").read_text() == before[0]
    torch.testing.assert_close(load_text_encoder(first).encode(CAPTIONS).tokens, before[1], rtol=1e-3, atol=1e-4)


def test_the_first_lines_name_what_is_lost_of_captions(corpus, tmp_path, capsys):
    ClapTask(settings(corpus, tmp_path / "run"))
    assert "captions are longer" not in capsys.readouterr().err
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows[1]["captions"].append("quick brown foxes jump over lazy dogs while wizards mix black quartz: lost")
    (corpus / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ClapTask(settings(corpus, tmp_path / "other"))
    said = capsys.readouterr().err
    assert "1 of 7 captions are longer than the 16 tokens" in said and "quartz: lost" in said


def test_text_features_stay_where_they_are_asked_to(corpus, tmp_path):
    """The audio tower goes on from a bundle; what a U-Net sees of a prompt is the same to the bit."""
    first = run(settings(corpus, tmp_path / "first"))
    goes_on = settings(corpus, tmp_path / "again", 2, initial=str(first), freeze_text=True)
    assert all(module.training for module in ClapTask(goes_on).modules["clap"].modules())
    second = run(goes_on)
    before, after = (load_file(folder / "text_encoder.safetensors") for folder in (first, second))
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    whole, changed = (load_clap(folder) for folder in (first, second))
    assert not torch.equal(whole.embed_text(CAPTIONS), changed.embed_text(CAPTIONS))  # by its last layer
    assert not torch.equal(whole.embed_audio(tones()), changed.embed_audio(tones()))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    (first / "audio_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="no audio_encoder"):
        run(settings(corpus, tmp_path / "x", initial=str(first)))
    with pytest.raises(ValueError, match="freeze_text needs initial"):
        settings(corpus, tmp_path / "x", freeze_text=True)


def test_main_captions_are_drawn_as_often_as_asked(corpus, tmp_path):
    shares = {}
    for main in (0.0, 0.5, 1.0):
        task = ClapTask(settings(corpus, tmp_path / "run", main_caption=main))
        again = task.tokenizer.token_to_id("Ġagain")
        assert again is not None  # the captions that aren't the main one have this word
        found = [(task.batch(number, 0, 1)["ids"] == again).any(1) for number in range(60)]
        shares[main] = 1 - float(torch.cat(found).float().mean())
    assert shares[1.0] == 1 and 0.4 < shares[0.0] < 0.6 and 0.67 < shares[0.5] < 0.83
    with pytest.raises(ValueError, match="main_caption must lie in 0..1"):
        settings(corpus, tmp_path / "run", main_caption=1.5)


def test_a_fusion_model_trains_on_long_and_short_sounds(corpus, tmp_path):
    model = yaml.safe_load(Path("configs/stable_audio/tiny.yaml").read_text())
    model["clap"]["audio_fusion"] = True
    (tmp_path / "fusion.yaml").write_text(yaml.safe_dump(model))
    task = ClapTask(settings(corpus, tmp_path / "run", model=str(tmp_path / "fusion.yaml")))
    batch = task.batch(0, 0, 1)
    assert batch["mels"].shape == (3, 4, 1001, 64) and batch["longer"].sum() >= 2
    assert all(torch.equal(v, task.batch(0, 0, 1)[k]) for k, v in batch.items())
    clap = task.modules["clap"]
    clap.loss(*clap(**batch)[:2]).backward()
    assert all(p.grad is not None for p in clap.parameters())


def test_the_language_model_reads_the_layer_that_generators_read(corpus, tmp_path):
    """Its loss is 0 for features that point at their tokens; it reaches that layer and all below, and nothing else."""
    task = ClapTask(settings(corpus, tmp_path / "run", language=1.0, corrupted=0.5))
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
    assert reached and all(text_encoder_name(name, clap.config) for name in reached)
    layers = clap.model.text_model.encoder.layer
    assert all(any(f"layer.{n}." in name for name in reached) for n in range(len(layers) - 1))


def test_too_few_items_and_captions_are_named(corpus, tmp_path):
    config = settings(corpus, tmp_path / "run", batch_size=4)
    with pytest.raises(UserError, match="batch_size"):
        run(config)
    (corpus / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="no item has a caption"):
        run(config)
