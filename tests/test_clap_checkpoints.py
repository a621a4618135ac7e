"""CLAP's sources: bundles, transformers' folders and LAION's files; all are told apart, and what is none is refused."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import zipfile
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_clap import PROMPTS, SIZES, small_clap, tones

from stable_audio_lite.bundle import SHIPPED, part_path
from stable_audio_lite.clap.checkpoints import (
    Checkpoint,
    load_clap,
    load_text_encoder,
    read_checkpoint,
    save_transformers,
    split_clap,
)
from stable_audio_lite.clap.laion import read_laion
from stable_audio_lite.clap.mel import SAMPLE_RATE, log_mel, mel_views
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.clap.tokenizer import tokenize
from stable_audio_lite.config import to_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import save_tensors


@pytest.fixture(scope="module")
def clap() -> Clap:
    return small_clap()


@pytest.fixture
def folder(clap: Clap, tmp_path: Path) -> Path:
    """A bundle with both towers of `clap`, in bfloat16."""
    config = {"kind": "any", "clap": to_dict(SIZES)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    clap.tokenizer.save(str(tmp_path / "tokenizer.json"))
    for part, state in split_clap(clap).items():
        rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
        save_tensors(part_path(tmp_path, part), rounded, {})
    return tmp_path


def test_a_bundle_has_one_tower_or_both(clap: Clap, folder: Path) -> None:
    whole, encoder = load_clap(folder), load_text_encoder(folder)
    for name, value in whole.model.state_dict().items():
        assert value.dtype == clap.model.state_dict()[name].dtype
        torch.testing.assert_close(value, clap.model.state_dict()[name], rtol=2**-8, atol=0)
    features = encoder.encode(PROMPTS)
    assert features.tokens.dtype == torch.float32
    assert torch.equal(features.tokens, Checkpoint.of(whole, "whole").text_encoder().encode(PROMPTS).tokens)
    part_path(folder, "audio_encoder").unlink()
    assert read_checkpoint(folder).clap() is None
    assert torch.equal(load_text_encoder(folder).encode(PROMPTS).tokens, features.tokens)
    with pytest.raises(UserError, match="has no audio_encoder.safetensors; give a bundle with both"):
        load_clap(folder)


def test_shipped_bundles_have_names() -> None:
    by_name, by_folder = read_checkpoint("starter"), read_checkpoint(SHIPPED["starter"])
    assert by_name.config == by_folder.config and by_name.parts.keys() == {"text_encoder", "audio_encoder"}
    with pytest.raises(UserError, match="no key 'clap'"):
        read_checkpoint("restorer")


def test_a_hub_id_is_fetched_without_other_networks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[str] = []

    def snapshot_download(_: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_clap("someone/bundle").config == SIZES
    assert {"config.yaml", "config.json", "text_encoder.safetensors", "model.safetensors"} < set(asked)
    assert not any(fnmatch("unet.safetensors", pattern) for pattern in asked)


def test_a_clap_of_other_sizes_is_refused(folder: Path) -> None:
    other = replace(SIZES, text_layers=4, audio_heads=(2, 2))
    with pytest.raises(UserError, match=r"clap.text_layers is 3 there, 4 here; clap.audio_heads is \(1, 2\) there"):
        load_text_encoder(folder, other)
    config = {"kind": "any", "clap": to_dict(SIZES) | {"vocab_size": 280}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="knows 300 tokens, but clap.vocab_size is 280"):
        read_checkpoint(folder)


def test_saved_folder_loads_in_transformers_and_here(clap, tmp_path):
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    save_transformers(clap, tmp_path / "clap")
    theirs = ClapModel.from_pretrained(tmp_path / "clap").eval()
    ids, mask = tokenize(clap.tokenizer, PROMPTS, 32)
    their_ids = AutoTokenizer.from_pretrained(tmp_path / "clap")(PROMPTS, padding=True)
    assert their_ids["input_ids"] == ids.tolist()
    features = ClapFeatureExtractor.from_pretrained(tmp_path / "clap")
    mels = features(list(tones().numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        output = theirs(ids, mels.input_features.float(), mels.is_longer, attention_mask=mask.long())
    torch.testing.assert_close(clap.embed_text(PROMPTS), output.text_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(clap.embed_audio(tones()), output.audio_embeds, rtol=0, atol=1e-3)

    again = load_clap(tmp_path / "clap")
    assert again.config == clap.config
    assert torch.equal(again.embed_text(PROMPTS), clap.embed_text(PROMPTS))
    assert torch.equal(again.embed_audio(tones()), clap.embed_audio(tones()))
    encoder, ours = load_text_encoder(tmp_path / "clap"), Checkpoint.of(clap, "small").text_encoder()
    assert torch.equal(encoder.encode(PROMPTS).tokens, ours.encode(PROMPTS).tokens)


def test_parts_hold_the_whole_clap(clap):
    parts = split_clap(clap)
    joined = Checkpoint(source="bundle", config=SIZES, tokenizer=clap.tokenizer, parts=parts).clap()
    assert all(torch.equal(value, clap.state_dict()[name]) for name, value in joined.state_dict().items())
    last = "text_model.encoder.layer.2.output.dense.weight"
    assert last in parts["audio_encoder"] and last.replace("2", "1") not in parts["audio_encoder"]


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
def test_laion_checkpoint_equals_laion_clap(monkeypatch, tmp_path, clap, fusion):
    theirs = laion_clap(monkeypatch, fusion)
    # As LAION's training writes it: learning rates are NumPy scalars.
    optimizer = {"param_groups": [{"lr": np.float64(1e-4), "params": [0]}]}
    state = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    torch.save({"epoch": 15, "state_dict": state, "optimizer": optimizer}, tmp_path / "laion.pt")
    clap.tokenizer.save(str(tmp_path / "tokenizer.json"))

    ours = load_clap(tmp_path / "laion.pt")
    assert ours.config.audio_fusion is fusion
    assert (ours.config.text_layers, ours.config.audio_depths) == (3, (2, 2, 6, 2))
    ids, mask = tokenize(clap.tokenizer, PROMPTS, 32)
    their_text = theirs.text_branch(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    features = load_text_encoder(tmp_path / "laion.pt").encode(PROMPTS)
    torch.testing.assert_close(features.tokens[features.mask], their_text.hidden_states[-2][mask], rtol=0, atol=1e-5)

    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    their_embedding = torch.nn.functional.normalize(theirs.encode_text(inputs, "cpu"), dim=-1)
    torch.testing.assert_close(ours.embed_text(PROMPTS), their_embedding, rtol=0, atol=1e-5)
    sound = torch.randn(1, 600_000 if fusion else 480_000) * 0.1
    mels = mel_views(ours.config, log_mel(ours.config, sound[0]))[None]
    longer = torch.tensor([fusion])
    heard = {"mel_fusion": mels.clone(), "longer": longer} if fusion else {"waveform": sound}
    their_audio = theirs.audio_projection(theirs.encode_audio(heard, "cpu")["embedding"])
    torch.testing.assert_close(
        ours.embed_audio(sound), torch.nn.functional.normalize(their_audio, dim=-1), rtol=0, atol=1e-4
    )


def test_scalars_of_numpy_1_and_2_are_read_alike(tmp_path: Path) -> None:
    """They differ in the module that the pickle names."""
    torch.save({"lr": np.float64(1e-4), "state_dict": {"x.weight": torch.ones(2)}}, tmp_path / "a.pt")
    for core in (b"core", b"_core"):
        with zipfile.ZipFile(tmp_path / "a.pt") as saved, zipfile.ZipFile(tmp_path / "b.pt", "w") as changed:
            for name in saved.namelist():
                changed.writestr(name, saved.read(name).replace(b"numpy.core.", b"numpy." + core + b"."))
        assert read_laion(tmp_path / "b.pt")["x.weight"].tolist() == [1, 1]


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_files_that_are_no_clap_are_refused(monkeypatch, tmp_path, clap):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clap.tokenizer.save("tokenizer.json")
    Path("corrupt.pt").write_bytes(b"not a checkpoint")
    Path("code.pt").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    torch.save({"state_dict": Malicious()}, "code_in_zip.pt")
    torch.save({"state_dict": {"text_branch.x": torch.zeros(1)}}, "other.pt")
    torch.save([1, 2], "list.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save("script.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("a program was loaded"))
    for name in ("corrupt.pt", "code.pt", "code_in_zip.pt", "script.pt", "other.pt", "list.pt", "missing.pt"):
        with pytest.raises(UserError, match=name) as refused:
            load_clap(name)
        assert "\n" not in str(refused.value)
    assert not Path("owned").exists()

    for name, spoil in {
        "empty": lambda f: [p.unlink() for p in f.iterdir()],
        "bert": lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
        "json": lambda f: (f / "config.json").write_text("{"),
        "tokens": lambda f: (f / "tokenizer.json").write_text("{}"),
        "cut": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "weightless": lambda f: (f / "model.safetensors").unlink(),
    }.items():
        folder = Path(name)
        save_transformers(clap, folder)
        spoil(folder)
        with pytest.raises(UserError, match=name) as refused:
            load_text_encoder(folder)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="neither a folder"):
        load_clap("nobody/nothing-of-the-kind")
