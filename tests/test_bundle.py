"""Bundles: they load alone, and say in one line what is wrong with them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stable_audio_lite import bundle
from stable_audio_lite.bundle import SHIPPED, read_part
from stable_audio_lite.clap.tokenizer import load_tokenizer
from stable_audio_lite.config import from_dict, load_config, to_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import StableAudioConfig, build_vae, load_model_config
from training.distill import DistillConfig
from training.frozen import load_frozen_clap

CONFIGS = Path(__file__).parents[1] / "configs" / "stable_audio"


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def failure(folder: Path | str) -> str:
    """The message with which loading fails; it must be one line."""
    with pytest.raises(UserError) as caught:
        StableAudio.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["paper", "starter", "tiny"])
def test_shipped_configs_load_and_survive_a_round_trip(name: str) -> None:
    config = load_model_config(CONFIGS / f"{name}.yaml")
    assert from_dict(StableAudioConfig, to_dict(config), "again") == config


def test_the_starters_config_is_that_of_the_shipped_bundle() -> None:
    """As distill.yaml makes it of what starter.yaml describes; only how the bundle generates may differ."""
    ours, shipped = (load_model_config(path) for path in (CONFIGS / "starter.yaml", SHIPPED["starter"]))
    distilled = load_config(CONFIGS / "distill.yaml", DistillConfig)
    unet = replace(ours.unet, guidance=distilled.largest_scale)
    assert replace(ours, unet=unet, generation=shipped.generation) == shipped
    assert shipped.generation.steps == distilled.steps


def test_paper_config_has_the_papers_derived_values() -> None:
    config = load_model_config(CONFIGS / "paper.yaml")
    assert config.window_samples == 4_194_304
    assert config.latent_shape == (64, 4096)
    assert (config.context_tokens, config.context_width) == (79, 768)


def test_saved_tensors_come_back_in_their_types(tiny_bundle: Path, tmp_path: Path) -> None:
    config = load_model_config(tiny_bundle)
    state = {k: v.bfloat16() for k, v in build_vae(config.vae).state_dict().items()}
    bundle.save_bundle(tmp_path / "half", config, {"vae": state}, extra_files={"README.md": "card"})
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == ["README.md", "config.yaml", "vae.safetensors"]
    again = bundle.read_part(tmp_path / "half", "vae")
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in state.items())
    vae = build_vae(config.vae)
    bundle.load_part(tmp_path / "half", "vae", vae)
    assert next(vae.parameters()).dtype == torch.float32


def test_a_missing_part_is_named(copy: Path) -> None:
    (copy / "unet.safetensors").unlink()
    assert "unet.safetensors: missing" in failure(copy)


def test_a_missing_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in failure(copy)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_damaged_weights_are_named(copy: Path, keep: int) -> None:
    path = copy / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "vae.safetensors: damaged" in failure(copy)


def test_mismatching_weights_name_keys_and_shapes(copy: Path) -> None:
    path = copy / "unet.safetensors"
    state = load_file(path)
    del state["latent_mean"]
    state["null"] = torch.zeros(3, 5)
    state["stranger"] = torch.zeros(7)
    save_file(state, path)
    message = failure(copy)
    assert "'null' has shape (3, 5), the config gives (18, 32)" in message
    assert "'latent_mean' (64,) is missing" in message
    assert "'stranger' (7,) is unexpected" in message


def test_another_size_in_the_config_is_noticed(copy: Path) -> None:
    data = yaml.safe_load((copy / "config.yaml").read_text())
    data["vae"]["decoder_width"] = 64
    (copy / "config.yaml").write_text(yaml.safe_dump(data))
    assert "the config gives" in failure(copy)


def test_a_bundle_of_another_version_says_so(copy: Path) -> None:
    data = yaml.safe_load((copy / "config.yaml").read_text())
    data["format"] = 2
    (copy / "config.yaml").write_text(yaml.safe_dump(data))
    assert "config.yaml: made by another version" in failure(copy)


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"latent_frames": None}, {"latent_frames": 10**6}, {"x": 1}],
)
def test_wrong_configs_name_file_and_key(copy: Path, change: dict) -> None:
    data = {**yaml.safe_load((copy / "config.yaml").read_text()), **change}
    (copy / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    message = failure(copy)
    assert "config.yaml" in message
    assert next(iter(change)) in message or "window" in message


def test_sound_has_two_channels(copy: Path) -> None:
    data = yaml.safe_load((copy / "config.yaml").read_text())
    data["vae"]["audio_channels"] = 1
    (copy / "config.yaml").write_text(yaml.safe_dump(data))
    assert "config.yaml: config: vae.audio_channels must be 2" in failure(copy)


def test_names_that_are_no_bundles(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "no bundle" in failure(tmp_path)
    assert "give the folder" in failure(tmp_path / "file")
    assert "no such bundle" in failure("nonsense")
    assert "no such bundle" in failure(tmp_path / "missing")


def test_hub_ids_are_downloaded_and_failures_are_one_line(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tiny_bundle))
    assert bundle.resolve("someone/model") == tiny_bundle

    def fail(name: str, **_: object) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "someone/model" in failure("someone/model")


def test_pushing_uploads_the_folder_and_failures_are_one_line(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict]] = []
    model = StableAudio.from_pretrained(tiny_bundle, device="cpu")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, name, **kw: calls.append((name, kw)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **kw: calls.append((kw["repo_id"], kw)))
    assert model.push_to_hub("me/model") == "https://huggingface.co/me/model"
    assert [name for name, _ in calls] == ["me/model", "me/model"]
    assert calls[0][1]["private"] is True and calls[1][1]["folder_path"] == tiny_bundle
    assert not any(fnmatch("notes.txt", pattern) for pattern in calls[1][1]["allow_patterns"])

    class ClientError(Exception):  # of the client's own, no OSError
        pass

    def fail(*_: object, **__: object) -> None:
        raise ClientError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(UserError, match="^me/model: can't be uploaded.*no network"):
        model.push_to_hub("me/model")


def test_other_folders_are_never_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    model = StableAudio.from_pretrained(tiny_bundle, device="cpu")
    with pytest.raises(UserError, match="holds other files"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        bundle.save_bundle(tmp_path / "thesis.txt", model.config, {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_the_old_bundle(copy: Path) -> None:
    config, before = load_model_config(copy), bundle.model_hash(copy)
    with pytest.raises(AttributeError):
        bundle.save_bundle(copy, config, {"vae": {"broken": None}})  # type: ignore[dict-item]
    assert bundle.model_hash(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_hash_follows_the_contents(copy: Path) -> None:
    before = bundle.model_hash(copy)
    (copy / "README.md").write_text("no part of the model")
    assert bundle.model_hash(copy) == before
    state = load_file(copy / "unet.safetensors")
    state["null"] += 1
    save_file(state, copy / "unet.safetensors")
    assert bundle.model_hash(copy) != before


def test_trainers_know_shipped_bundles_by_name() -> None:
    """As a VAE, a CLAP or something to go on from."""
    folder = SHIPPED["starter"]
    config = load_model_config("starter")
    assert config == load_model_config(folder)
    assert read_part("starter", "unet").keys() == read_part(folder, "unet").keys()
    frozen = load_frozen_clap("starter", config.clap)
    frozen.check_same(read_part(folder, "text_encoder"), "starter", "starter")
    assert frozen.text.tokenizer.get_vocab_size() == load_tokenizer(folder / "tokenizer.json").get_vocab_size()
