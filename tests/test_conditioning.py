"""Text features, the three sources of CLAP weights, the tokenizer, and the timing tokens."""

import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stable_audio_lite.clap.laion import read_laion
from stable_audio_lite.clap.model import Clap, ClapConfig, read_transformers, tokenize
from stable_audio_lite.clap.text import TextEncoder, join_clap, load_clap, split_clap
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import Conditioner, TimingConfig, drop
from stable_audio_lite.nn.attention import Condition

PROMPTS = ["a slow piano ballad in C major", "drums", "a fast rock song with loud drums and bass, 140 bpm"]
SIZES = ClapConfig(
    vocab_size=300,
    text_width=32,
    text_layers=3,
    text_heads=2,
    text_feed_forward=64,
    text_positions=34,
    max_tokens=32,
    audio_width=8,
    audio_patch=8,
    audio_depths=(1, 1),
    audio_heads=(1, 2),
    audio_fusion=False,
    embedding=16,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS * 3, 300)


@pytest.fixture(scope="module")
def clap(tokenizer):
    torch.manual_seed(0)
    return Clap(SIZES, tokenizer).eval()


def test_features_are_the_next_to_last_layers(clap):
    encoder = TextEncoder.from_clap(clap)
    condition = encoder.encode(PROMPTS)
    ids, mask = tokenize(clap.tokenizer, PROMPTS, 32)
    states = clap.model.text_model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert condition.tokens.shape == (3, encoder.max_tokens, encoder.width) == (3, 32, 32)
    torch.testing.assert_close(condition.tokens[mask], states[-2][mask], rtol=0, atol=1e-5)
    assert not torch.allclose(states[-1][mask], states[-2][mask], atol=1e-2)


def test_padding_is_masked_and_other_prompts_do_not_matter(clap):
    encoder = TextEncoder.from_clap(clap)
    together, alone = encoder.encode(PROMPTS), encoder.encode(PROMPTS[1:2])
    assert alone.mask.sum() == len(clap.tokenizer.encode("drums").ids)
    assert torch.equal(together.mask[1], alone.mask[0])
    torch.testing.assert_close(together.tokens[1], alone.tokens[0], rtol=0, atol=1e-6)
    assert not together.tokens[~together.mask].any()


def test_empty_and_overlong_prompts(clap):
    condition = TextEncoder.from_clap(clap).encode(["", "piano and drums " * 40])
    assert condition.mask.sum(1).tolist() == [2, 32]
    with pytest.raises(ValueError, match="list"):
        TextEncoder.from_clap(clap).encode("drums")


def test_encoder_stays_frozen(clap):
    encoder = TextEncoder.from_clap(clap).train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_split_and_join_give_the_same_clap(clap):
    parts = split_clap(clap)
    joined = join_clap(SIZES, clap.tokenizer, parts["text_encoder"], parts["audio_encoder"], "bundle")
    torch.testing.assert_close(joined.embed_text(PROMPTS), clap.embed_text(PROMPTS), rtol=0, atol=0)
    last = "text_model.encoder.layer.2.output.dense.weight"
    assert last in parts["audio_encoder"] and last.replace("2", "1") not in parts["audio_encoder"]


@pytest.mark.parametrize("text", ["zyzzyva", "🎹🎸", "ピアノ", "ÄÖÜ piano", "\x00\x7f", "a" * 200])
def test_no_word_is_unknown(tokenizer, text):
    tokenizer.no_truncation()
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-1]) == (0, 2) and len(ids) > 2
    assert not {1, 3} & set(ids)
    assert tokenizer.decode(ids).strip() == text.lower()


def test_special_tokens_are_where_roberta_has_them(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="vocab_size"):
        train_tokenizer(PROMPTS, 200)


def laion_clap(monkeypatch, fusion: bool):
    """LAION-CLAP's own network with a small random RoBERTa.

    Importing the package as a whole fetches tokenizers and leaves its folder, with another `training` in it, on the
    path; its `clap_module` alone does neither.
    """
    from transformers import RobertaConfig, RobertaModel

    spec = importlib.util.find_spec("laion_clap")
    assert spec and spec.submodule_search_locations
    path = list(sys.path)
    sys.path.append(spec.submodule_search_locations[0])
    try:
        from clap_module.model import CLAP
    finally:
        sys.path[:] = path
    small = RobertaConfig(
        vocab_size=300,
        num_hidden_layers=3,
        intermediate_size=256,
        max_position_embeddings=34,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
    )
    monkeypatch.setattr(RobertaModel, "from_pretrained", lambda name: RobertaModel(small))
    audio = {"model_type": "HTSAT", "model_name": "tiny", "class_num": 527, "hop_size": 480}
    text = {"context_length": 77, "vocab_size": 300, "width": 768, "heads": 12, "layers": 12, "model_type": "roberta"}
    torch.manual_seed(0)
    return CLAP(768, audio, text, enable_fusion=fusion, fusion_type="aff_2d" if fusion else "None").eval()


@pytest.mark.parametrize("fusion", [False, True])
@torch.no_grad()
def test_laion_checkpoint_equals_laion_clap(monkeypatch, tmp_path, tokenizer, fusion):
    theirs = laion_clap(monkeypatch, fusion)
    # As LAION's own files have it: a figure as a NumPy scalar, and pickled by protocol 4.
    checkpoint = {"best": np.float64(0.9), "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}
    torch.save(checkpoint, tmp_path / "laion.pt", pickle_protocol=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    weights = read_laion(tmp_path / "laion.pt", tmp_path / "tokenizer.json")
    assert weights.config.audio_fusion is fusion
    assert (weights.config.text_layers, weights.config.audio_depths) == (3, (2, 2, 6, 2))
    ids, mask = tokenize(tokenizer, PROMPTS, 32)
    their_text = theirs.text_branch(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    features = TextEncoder.from_laion(tmp_path / "laion.pt", tmp_path).encode(PROMPTS)
    torch.testing.assert_close(features.tokens[mask], their_text.hidden_states[-2][mask], rtol=0, atol=1e-5)

    ours = Clap.from_weights(weights)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    their_embedding = torch.nn.functional.normalize(theirs.encode_text(inputs, "cpu"), dim=-1)
    torch.testing.assert_close(ours.embed_text(PROMPTS), their_embedding, rtol=0, atol=1e-5)
    sound = torch.randn(1, 600_000 if fusion else 480_000) * 0.1
    mels, longer = ours.features(sound[0])[None], torch.tensor([fusion])
    heard = {"mel_fusion": mels.clone(), "longer": longer} if fusion else {"waveform": sound}
    their_audio = theirs.audio_projection(theirs.encode_audio(heard, "cpu")["embedding"])
    torch.testing.assert_close(
        ours.embed_audio(sound), torch.nn.functional.normalize(their_audio, dim=-1), rtol=0, atol=1e-4
    )


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_files_that_are_no_clap_are_refused(monkeypatch, tmp_path, clap, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save("tokenizer.json")
    Path("corrupt.pt").write_bytes(b"not a checkpoint")
    Path("code.pt").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    torch.save({"state_dict": Malicious()}, "code_in_zip.pt")
    torch.save({"state_dict": {"text_branch.x": torch.zeros(1)}}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save("script.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("a program was loaded"))
    for name in ("corrupt.pt", "code.pt", "code_in_zip.pt", "script.pt", "other.pt", "list.pt", "missing.pt"):
        with pytest.raises(UserError, match=name) as refused:
            load_clap(name, "tokenizer.json")
        assert "\n" not in str(refused.value)
    assert not Path("owned").exists()

    clap.save("whole")
    for name, spoil in {
        "empty": lambda f: [p.unlink() for p in f.iterdir()],
        "bert": lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "json": lambda f: (f / "config.json").write_text("{"),
        "tokens": lambda f: (f / "tokenizer.json").write_text("{}"),
        "cut": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "weightless": lambda f: (f / "model.safetensors").unlink(),
    }.items():
        folder = Path(name)
        clap.save(folder)
        spoil(folder)
        with pytest.raises(UserError, match=name) as refused:
            TextEncoder.from_transformers(folder)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="neither a folder"):
        read_transformers("nobody/nothing-of-the-kind")


def condition(batch: int = 3, tokens: int = 77, width: int = 16) -> Condition:
    return Condition(torch.randn(batch, tokens, width), torch.rand(batch, tokens) < 0.5)


def test_timing_tokens_follow_the_text():
    conditioner = Conditioner(TimingConfig(max_seconds=95), 16)
    text = condition()
    joined = conditioner(text, torch.tensor([0.0, 10.0, 95.0]), torch.tensor([30.0, 10.0, 0.0]))
    assert joined.tokens.shape == (3, 79, 16)
    assert torch.equal(joined.tokens[:, :77], text.tokens) and torch.equal(joined.mask[:, :77], text.mask)
    assert joined.mask[:, 77:].all()
    assert torch.equal(joined.tokens[:, 77], conditioner.seconds_start.weight[[0, 10, 95]])
    assert torch.equal(joined.tokens[:, 78], conditioner.seconds_total.weight[[30, 10, 0]])
    assert {n for n, _ in conditioner.named_parameters()} == {"seconds_start.weight", "seconds_total.weight"}


def test_between_whole_seconds_the_nearest_two_are_mixed():
    conditioner = Conditioner(TimingConfig(max_seconds=95), 16)
    joined = conditioner(condition(), torch.zeros(3), torch.tensor([7.25, 94.5, 95.0]))
    table = conditioner.seconds_total.weight
    expected = torch.stack([0.75 * table[7] + 0.25 * table[8], (table[94] + table[95]) / 2, table[95]])
    assert torch.allclose(joined.tokens[:, 78], expected, atol=1e-6)


@pytest.mark.parametrize("seconds", [-1.0, 95.1, float("nan"), float("inf")])
def test_seconds_outside_the_table_are_refused(seconds):
    conditioner = Conditioner(TimingConfig(max_seconds=95), 16)
    with pytest.raises(ValueError, match="seconds_total must lie in 0..95"):
        conditioner(condition(), torch.zeros(3), torch.tensor([1.0, seconds, 2.0]))


def test_dropped_items_have_the_null_and_the_others_their_own():
    given, null = condition(4), condition(1)
    dropped = torch.tensor([False, True, False, True])
    some = drop(given, null, dropped)
    assert torch.equal(some.tokens[~dropped], given.tokens[~dropped])
    assert torch.equal(some.mask[~dropped], given.mask[~dropped])
    assert torch.equal(some.tokens[dropped], null.tokens.expand(2, -1, -1))
    assert torch.equal(some.mask[dropped], null.mask.expand(2, -1))
    with pytest.raises(ValueError, match="null condition"):
        drop(given, condition(1, 3, 2), dropped)


def test_the_null_learns_only_from_dropped_items():
    null = Condition(torch.zeros(1, 4, 2, requires_grad=True), torch.ones(1, 4, dtype=torch.bool))
    drop(condition(8, 4, 2), null, torch.zeros(8, dtype=torch.bool)).tokens.sum().backward()
    assert not null.tokens.grad.any()
    drop(condition(8, 4, 2), null, torch.ones(8, dtype=torch.bool)).tokens.sum().backward()
    assert (null.tokens.grad == 8).all()
