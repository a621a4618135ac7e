"""Training of the VAE: it learns, its losses' gradients, its phases, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import (
    TINY,
    assert_same_curve,
    assert_same_weights,
    load,
    losses,
    stop_after,
    vae_settings,
)

from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.codec import Codec
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.vae import Posterior
from training import train_vae
from training.checkpoint import Resumable, checkpoints
from training.losses import feature_matching, hinge_discriminator, hinge_generator

LOUD = {"waveform/relative": 1.0, "stft/sum": 1.0, "stft/difference": 1.0, "stft/mel": 1.0, "kl/latent": 1e-4}


def test_vae_learns(data: Path, tmp_path: Path) -> None:
    """Muon and the waveform term bring the loss down at once, as they must on six tones."""
    settings = vae_settings(data, tmp_path / "run", 40) | {"weights": LOUD}
    for key in ("discriminator", "discriminator_optimizer"):
        settings.pop(key)
    train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    curve = losses(tmp_path / "run")
    first = np.mean([curve[s]["loss/total"] for s in range(5)])
    last = np.mean([curve[s]["loss/total"] for s in range(35, 40)])
    assert last < 0.9 * first
    assert curve[0]["loss/total"] == pytest.approx(sum(w * curve[0][name] for name, w in LOUD.items()), rel=1e-3)


def test_all_held_out_crops_count_alike(data: Path, tmp_path: Path) -> None:
    """However many go through the networks at once; and there are as many as asked for."""
    figures = []
    for batch in (5, 2):
        settings = vae_settings(data, tmp_path / "run", 1) | {"held_out": str(data), "held_out_crops": 5}
        task = train_vae.VAETask(load(train_vae.TrainVAEConfig, settings | {"batch_size": batch}, tmp_path))
        assert len(task.validation) == 5
        with torch.no_grad():
            figures.append(task.evaluate(0))
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)


def test_one_look_of_the_discriminator_gives_both_gradients(data: Path, tmp_path: Path) -> None:
    """Every parameter's gradient is that of the losses written down as in the papers, each network asked anew."""
    settings = vae_settings(data, tmp_path / "run", 1) | {"discriminator_start": 0}
    task = train_vae.VAETask(load(train_vae.TrainVAEConfig, settings, tmp_path))
    vae, judge = task.modules["vae"], task.modules["discriminator"]
    batch, weights = task.batch(0, 0, 1), task.config.weights
    audio = batch["audio"]
    output, mean, std = vae(audio, batch["noise"])
    fake, real = judge(output), judge(audio)
    losses = task.reconstruction(output, audio) | {"kl/latent": Posterior(mean, std).kl()}
    losses |= {"adversarial/generator": hinge_generator(fake), "adversarial/features": feature_matching(real, fake)}
    loss = sum(weights[name] * value for name, value in losses.items() if name in weights)
    expected = torch.autograd.grad(loss, list(vae.parameters()))
    hinge = hinge_discriminator(judge(audio), judge(output.detach()))
    expected += torch.autograd.grad(hinge, list(judge.parameters()))

    class Backward:
        def __call__(self, name: str, loss: torch.Tensor) -> None:
            loss.backward()

        def gradient(self, loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(loss, at, retain_graph=True)[0]

    figures = task.step(batch, 0, Backward())
    assert float(figures["loss/total"].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for parameter, gradient in zip([*vae.parameters(), *judge.parameters()], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-6))


def test_second_phase_keeps_the_latents(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """To the bit, as the encoder's weights; no gradient reaches it, and the decoder learns."""
    settings = vae_settings(data, tmp_path / "second", 5) | {"initial": str(bundles["vae"]), "freeze_encoder": True}
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = train_vae.VAETask(config)
    second = train_vae.fit(config.run, task, config)
    encoder = task.modules["vae"].encoder
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    before, after = (load_file(b / "vae.safetensors") for b in (bundles["vae"], second))
    for key in before:
        same = torch.equal(before[key], after[key])
        assert same == key.startswith("encoder."), key
    files = [Codec.from_pretrained(b, "cpu", "float32") for b in (bundles["vae"], second)]
    for number, codec in enumerate(files):
        codec.encode_file(data / "0.wav", tmp_path / f"{number}.safetensors")
    first, again = (load_file(tmp_path / f"{number}.safetensors")["latent"] for number in (0, 1))
    assert torch.equal(first, again)


def test_a_model_that_would_change_the_latents_is_refused(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """The rate is no weight: the config alone says whether the frozen encoder's latents stay what they are."""
    model = yaml.safe_load(TINY.read_text()) | {"sample_rate": 22050}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(model))
    frozen = {"model": str(tmp_path / "other.yaml"), "initial": str(bundles["vae"]), "freeze_encoder": True}
    with pytest.raises(UserError, match=r"freeze_encoder: .* has sample_rate 44100, the model has 22050"):
        train_vae.VAETask(load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "a", 1) | frozen, tmp_path))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"freeze_encoder": True}, "freeze_encoder needs initial"),
        ({"stft_windows": []}, "stft_windows"),
        ({"weights": {"stft/levels": 1.0}}, "weights: a waveform VAE has no loss 'stft/levels'"),
        ({"stft_windows": [32768]}, "8192 samples are too few for a window of 32768"),
        ({"discriminator": {"windows": [16384], "filters": 4}}, "too few for a window of 16384"),
    ],
)
def test_settings_that_cannot_work_are_named(wrong: dict, words: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        train_vae.VAETask(load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "a", 1) | wrong, tmp_path))


def test_the_discriminator_begins_later(data: Path, tmp_path: Path) -> None:
    """It learns and is heard from its own first step on, at rates that rise from there."""
    settings = vae_settings(data, tmp_path / "run", 8) | {"discriminator_start": 2}
    settings["discriminator_optimizer"] = {"lr": 1e-3, "warmup_steps": 4}
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = train_vae.VAETask(config)
    train_vae.fit(config.run, task, config)
    curve = losses(tmp_path / "run")
    assert [s for s in range(8) if "discriminator/hinge" in curve[s]] == [2, 3, 4, 5, 6, 7]
    assert [s for s in range(8) if "adversarial/generator" in curve[s]] == [2, 3, 4, 5, 6, 7]
    rates = [task.rate("discriminator", step, 8) for step in range(2, 8)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert task.rate("vae", 2, 8) == config.optimizer.rate(2, 8)


@pytest.mark.parametrize("continues", [True, False])
def test_second_phase_continues_or_restarts_the_discriminator(continues: bool, data: Path, tmp_path: Path) -> None:
    """Its weights and both optimizers' state are the first phase's, where asked for, and new otherwise."""
    first, second = tmp_path / "first", tmp_path / "second"
    bundle = train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, first, 6), tmp_path))
    settings = vae_settings(data, second, 2) | {"initial": str(bundle), "freeze_encoder": True}
    settings |= {"continues": str(first)} if continues else {}
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = train_vae.VAETask(config)
    optimizers = {name: task.optimizers[name].build(module) for name, module in task.modules.items()}
    task.begin(Resumable(task.modules, optimizers, {}))
    last = checkpoints(first / "checkpoints")[-1]
    trained = load_file(last / "discriminator.safetensors")
    same = [torch.equal(v, trained[k]) for k, v in task.modules["discriminator"].state_dict().items()]
    assert all(same) == continues
    for name, optimizer in optimizers.items():
        before = load_file(last / f"optimizer_{name}.safetensors")
        parameters = {k: p for k, p in task.modules[name].named_parameters() if p.requires_grad}
        assert bool(optimizer.state) == continues
        for key, parameter in parameters.items() if continues else ():
            for kind, value in optimizer.state[parameter].items():
                assert torch.equal(value, before[f"{key}/{kind}"]), (name, key, kind)
    train_vae.run(config)


def test_runs_that_cannot_be_continued_are_named(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    settings = vae_settings(data, tmp_path / "run", 2) | {"initial": str(bundles["vae"])}
    with pytest.raises(UserError, match="none: holds no checkpoint"):
        train_vae.run(load(train_vae.TrainVAEConfig, settings | {"continues": str(tmp_path / "none")}, tmp_path))
    other = settings | {"continues": str(bundles["vae"].parent), "optimizer": {"lr": 1e-3}}
    with pytest.raises(UserError, match="step_00000002.*another optimizer's state"):
        train_vae.run(load(train_vae.TrainVAEConfig, other, tmp_path))


def test_unreadable_files_are_skipped_and_listed(data: Path, tmp_path: Path) -> None:
    """Two of eight files are broken: training ends and lists them, and refuses where fewer are allowed."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in data.glob("*.wav"):
        (folder / file.name).symlink_to(file)
    (folder / "a.wav").write_bytes(b"no audio")
    (folder / "b.wav").write_bytes((data / "0.wav").read_bytes()[:20000])
    settings = vae_settings(folder, tmp_path / "run", 6)
    train_vae.run(load(train_vae.TrainVAEConfig, settings | {"max_unreadable": 0.3}, tmp_path))
    listed = [json.loads(line) for line in (tmp_path / "run/unreadable.jsonl").read_text().splitlines()]
    assert {Path(row["file"]).name for row in listed} == {"a.wav", "b.wav"}
    assert losses(tmp_path / "run")[5]["data/unreadable"] == 2
    settings["run"]["output"] = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"max_unreadable allows 1.00%"):
        train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))


@pytest.fixture
def spectral(data: Path, tmp_path: Path) -> dict[str, object]:
    """Settings of a VAE on spectrograms."""
    model = yaml.safe_load(TINY.read_text())
    model["vae"] = {"kind": "spectrogram", "width": 32, "encoder_blocks": 1, "decoder_blocks": 1}
    (tmp_path / "spectral.yaml").write_text(yaml.safe_dump(model))
    settings = vae_settings(data, tmp_path / "run", 30) | {"model": str(tmp_path / "spectral.yaml")}
    for key in ("discriminator", "discriminator_optimizer", "stft_windows"):
        settings.pop(key)
    weights = {"features/log": 1.0, "features/root": 2.0, "features/stereo": 1.0, "kl/latent": 1e-4}
    return settings | {"weights": weights, "optimizer": {"lr": 3e-3}, "held_out": str(data)}


def test_spectrogram_vae_learns_and_resumes(spectral: dict, data: Path, tmp_path: Path) -> None:
    """By the same trainer: features come nearer, and an interrupted run ends with the same weights."""
    for name in ("whole", "parts"):
        spectral["run"]["output"] = str(tmp_path / name)
        config = load(train_vae.TrainVAEConfig, spectral, tmp_path)
        if name == "parts":
            stop_after(config, train_vae, step=13)
        train_vae.run(config)
    assert_same_curve(tmp_path / "whole", tmp_path / "parts", 10, 30)
    assert_same_weights(tmp_path / "whole/bundle", tmp_path / "parts/bundle")
    curve = losses(tmp_path / "whole")
    assert curve[29]["features/log"] < 0.8 * curve[0]["features/log"]
    codec = Codec.from_pretrained(tmp_path / "whole/bundle", "cpu", "float32")
    codec.encode_file(data / "0.wav", tmp_path / "0.safetensors")
    codec.decode_file(tmp_path / "0.safetensors", tmp_path / "again.wav")
    assert read_audio(tmp_path / "again.wav", 44100).shape == read_audio(data / "0.wav", 44100).shape


def test_spectrogram_vaes_second_phase_keeps_the_latents(spectral: dict, tmp_path: Path) -> None:
    first = train_vae.run(load(train_vae.TrainVAEConfig, spectral | {"run": spectral["run"] | {"steps": 3}}, tmp_path))
    settings = spectral | {"initial": str(first), "freeze_encoder": True}
    settings["run"] = spectral["run"] | {"steps": 3, "output": str(tmp_path / "second")}
    second = train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    before, after = load_file(first / "vae.safetensors"), load_file(second / "vae.safetensors")
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("encoder."), key


def test_waveform_losses_are_refused_for_spectrograms(spectral: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a spectrogram VAE has no loss 'stft/sum'; its losses are features/log"):
        train_vae.VAETask(load(train_vae.TrainVAEConfig, spectral | {"weights": {"stft/sum": 1.0}}, tmp_path))
