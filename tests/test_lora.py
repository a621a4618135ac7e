"""LoRA: only the change is trained, peft reads it, and merging it is peft's own sum at any strength."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import assert_same_weights, diffusion_settings, load, stop_after

from stable_audio_lite import cli
from stable_audio_lite.audio.io import read_metadata
from stable_audio_lite.bundle import load_part
from stable_audio_lite.errors import UserError
from stable_audio_lite.lora import merge_lora
from stable_audio_lite.models.unet import UNet
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import load_model_config
from training import train_diffusion

ENCODER = "the latents that it knows"


@pytest.fixture(scope="module")
def base(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose attention is not zero any more."""
    folder = tmp_path_factory.mktemp("base")
    return train_diffusion.run(config_of(bundles, folder / "run", folder, 3))


def config_of(bundles: dict[str, Path], output: Path, folder: Path, steps: int, **more: object) -> object:
    settings = diffusion_settings(bundles, output, steps) | more
    return load(train_diffusion.TrainDiffusionConfig, settings, folder)


@pytest.fixture(scope="module")
def lora(base: Path, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained from `base` for ten steps."""
    folder = tmp_path_factory.mktemp("lora")
    config = config_of(bundles, folder / "run", folder, 10, initial=str(base), lora={"rank": 4, "alpha": 8})
    return train_diffusion.run(config) / "lora"


def unet_of(bundle: Path) -> UNet:
    unet = load_model_config(bundle).network()
    load_part(bundle, "unet", unet)
    return unet.eval()


def stored_encoder(lora: Path) -> str:
    from safetensors import safe_open

    with safe_open(lora / "adapter_model.safetensors", "pt") as file:
        return file.metadata()["encoder"]


@torch.no_grad()
def output(unet: UNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.channels, 16, generator=generator)
    return unet(x, torch.tensor([0.3, 0.7]), unet.context(unet.null_condition(2)))


def test_the_change_alone_is_trained(base: Path, lora: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """At first it changes nothing; later all other weights, the timing embeddings included, are still the bundle's."""
    config = config_of(bundles, tmp_path / "r", tmp_path, 1, initial=str(base), lora={"rank": 4})
    model = train_diffusion.DiffusionTask(config).modules["model"]
    torch.testing.assert_close(output(model.network.eval()), output(unet_of(base)), rtol=0, atol=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert any("cross_attention" in n for n in trained) and any("feed_forward" in n for n in trained)
    newest = load_file(lora.parents[1] / "checkpoints/step_00000010/model.safetensors")
    for part, prefix in (("unet", "network."), ("conditioner", "conditioner.")):
        for key, value in load_file(base / f"{part}.safetensors").items():
            layer, _, kind = key.rpartition(".")
            name = prefix + key if prefix + key in newest else f"{prefix}{layer}.base_layer.{kind}"
            assert torch.equal(newest[name], value), key
    merge_lora(unet := unet_of(base), lora, stored_encoder(lora))
    for key, value in load_file(lora.parent / "unet.safetensors").items():  # the bundle has it merged
        torch.testing.assert_close(value, unet.state_dict()[key], rtol=0, atol=0)
    changes = load_file(lora / "adapter_model.safetensors")
    assert all(bool(value.any()) for key, value in changes.items())


def test_merging_is_what_peft_computes(base: Path, lora: Path) -> None:
    """peft reads the folder as its own; merged weights give its output, and the change grows with the strength."""
    import peft

    plain = output(unet_of(base))
    theirs = output(peft.PeftModel.from_pretrained(unet_of(base), str(lora)).base_model.model)
    assert float((theirs - plain).abs().max()) > 1e-4
    changes = []
    for strength in (0.0, 1.0, 0.5):
        merge_lora(unet := unet_of(base), lora, stored_encoder(lora), strength)
        changes.append(unet.state_dict()["middle.blocks.0.attention.to_q.weight"])
        if strength == 1.0:
            torch.testing.assert_close(output(unet), theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(changes[0], unet_of(base).state_dict()["middle.blocks.0.attention.to_q.weight"])
    assert not torch.equal(changes[1], changes[0])
    torch.testing.assert_close(changes[2] - changes[0], (changes[1] - changes[0]) / 2)


def test_a_stopped_run_goes_on(base: Path, lora: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    settings = {"initial": str(base), "lora": {"rank": 4, "alpha": 8}}
    config = config_of(bundles, tmp_path / "run", tmp_path, 10, **settings)
    stop_after(config, train_diffusion, 6)
    assert_same_weights(lora, train_diffusion.run(config) / "lora")


def test_the_pipeline_merges_records_and_saves(
    base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sound names its LoRA; the model saved with it sounds the same alone; without it, another."""
    options = ["--model", str(base), "--device", "cpu", "--dtype", "float32", "--steps", "2", "--seconds", "0.2"]
    command = ["generate", "tone", *options, "--seed", "1", "--lora", str(lora), "--lora-strength", "2"]
    assert cli.main([*command, "-o", str(tmp_path / "a.wav")]) == 0
    stored = read_metadata(tmp_path / "a.wav").settings
    assert stored["lora"] == str(lora) and stored["lora_strength"] == 2
    with_lora = StableAudio.from_pretrained(base, "cpu", "float32", lora=lora, lora_strength=2.0)
    saved = StableAudio.from_pretrained(with_lora.save_pretrained(tmp_path / "saved"), "cpu", "float32")
    plain = StableAudio.from_pretrained(base, "cpu", "float32")
    sounds = [m.generate("tone", seconds=0.2, steps=2, seed=1).audio for m in (with_lora, saved, plain)]
    assert torch.equal(sounds[0], sounds[1]) and not torch.equal(sounds[0], sounds[2])
    with pytest.raises(UserError, match="another folder"):
        with_lora.save_pretrained(base)
    with pytest.raises(UserError, match="save_pretrained"):
        with_lora.push_to_hub("someone/model")


def test_what_does_not_fit_is_refused(base: Path, lora: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    encoder = stored_encoder(lora)
    with pytest.raises(UserError, match="another VAE"):
        merge_lora(unet_of(base), lora, ENCODER)
    with pytest.raises(UserError, match="adapter_config.json: no such file"):
        merge_lora(unet_of(base), tmp_path, encoder)
    other = shutil.copytree(lora, tmp_path / "other")
    state = load_file(lora / "adapter_model.safetensors")
    key = min(k for k in state if k.endswith("lora_A.weight"))
    save_file(state | {key: state[key][:, 1:].contiguous()}, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{key.removesuffix('.lora_A.weight')}.*of shape.*the model has"):
        merge_lora(unet_of(base), other, encoder)
    config = json.loads((lora / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora is True"):
        merge_lora(unet_of(base), other, encoder)
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="not the config of a LoRA"):
        merge_lora(unet_of(base), other, encoder)
    with pytest.raises(UserError, match="lora needs `initial`"):
        config_of(bundles, tmp_path / "r", tmp_path, 1, lora={"rank": 4})
