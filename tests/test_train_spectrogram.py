"""Training on spectrograms: by the same command as the latent system, exactly resumed, and able to learn a clip."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ONE_THREAD, ROOT, assert_same_curve, assert_same_weights, load, run_settings, stop_after

from stable_audio_lite.audio.io import read_audio, write_audio
from stable_audio_lite.bundle import load_part
from stable_audio_lite.config import load_config, save_config
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import SystemConfig, load_system
from training import train_diffusion
from training.plan import plan
from training.train_diffusion import DiffusionTask, TrainDiffusionConfig

KINDS = ("complex_stft", "spectrogram_transformer")


def spectral_settings(
    kind: str, data: Path, bundles: dict[str, Path], output: Path, steps: int, **more: object
) -> dict:
    settings: dict[str, object] = {
        "model": str(ROOT / f"configs/{kind}/tiny.yaml"),
        "data": str(data),
        "held_out": str(data),
        "batch_size": 4,
        "optimizer": {"lr": 2e-3, "warmup_steps": 5},
        "run": run_settings(output, steps, **{"evaluate_every": 10, **more}),
    }
    return settings | ({"clap": str(bundles["clap"])} if kind == "spectrogram_transformer" else {})


def config_of(settings: dict, folder: Path) -> TrainDiffusionConfig:
    config = load(TrainDiffusionConfig, settings, folder)
    assert isinstance(config, TrainDiffusionConfig)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_repeats_an_uninterrupted_one(
    kind: str, data: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Losses, held-out figures and weights."""
    more = {"checkpoint_every": 3, "evaluate_every": 2}
    whole, broken = (
        config_of(spectral_settings(kind, data, bundles, tmp_path / name, 7, **more), tmp_path) for name in ("a", "b")
    )
    one = train_diffusion.run(whole)
    stop_after(broken, train_diffusion, 4)
    other = train_diffusion.run(broken)
    assert_same_curve(tmp_path / "a", tmp_path / "b", 0, 7)
    assert_same_weights(one, other)
    assert load_system(one) == load_system(whole.model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_of_the_latent_system_trains_these(
    kind: str, data: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(spectral_settings(kind, data, bundles, tmp_path / "run", 2)))
    command = [sys.executable, "-m", "training.train_diffusion", "--config", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle = Path(done.stdout.split()[-1])
    config = load_system(bundle)
    assert config.kind == kind
    network = config.network()
    load_part(bundle, config.part, network)
    parts = {"text_encoder.safetensors", "conditioner.safetensors"} if kind == "spectrogram_transformer" else set()
    assert parts <= {file.name for file in bundle.iterdir()}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_one_clip_is_learned(kind: str, data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """From half noise, the network restores a clip to within 5 % of its variance."""
    clip = tmp_path / "clip"
    clip.mkdir()
    window = 512 / 8000
    write_audio(clip / "0.wav", read_audio(data / "0.wav", 44100, 0.5, window), 44100)
    (clip / "metadata.jsonl").write_text('{"file_name": "0.wav", "text": "a tone"}\n')
    steps = 150 if kind == "complex_stft" else 500
    more = {"evaluate_every": 0, "log_every": 100, "ema_decay": 0.9}
    settings = spectral_settings(kind, clip, bundles, tmp_path / "run", steps, **more)
    config = config_of(settings | {"held_out": None}, tmp_path)
    bundle = train_diffusion.run(config)
    task = DiffusionTask(config)
    assert task.model.spectrogram.seconds == window
    task.modules["model"].load_state_dict(_whole(bundle, task))
    torch.manual_seed(0)
    batch = task.examples.draw(range(8), 5) | {"dropped": torch.zeros(8, dtype=torch.bool)}
    x0, eps = batch["x0"], torch.randn_like(batch["x0"])
    middle = torch.full((8,), 0.5)
    with torch.no_grad():
        errors = task.errors(batch | {"eps": eps, "shares": middle})[0].mean()
    alpha, sigma = (float(w[0]) for w in task.process.alpha_sigma(task.process.at(middle)))
    spectrogram_error = errors * (sigma / alpha) ** 2 if task.process.objective == "eps" else errors
    assert float(spectrogram_error / x0.var()) < 0.05


def _whole(bundle: Path, task: DiffusionTask) -> dict[str, torch.Tensor]:
    state = load_file(bundle / f"{task.model.part}.safetensors")
    if task.clap is None:
        return state
    conditioner = load_file(bundle / "conditioner.safetensors")
    return {f"network.{k}": v for k, v in state.items()} | {f"conditioner.{k}": v for k, v in conditioner.items()}


def test_examples_are_what_the_files_hold(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """A crop's spectrogram turns back into the mono mix of the stretch that it names, with a caption of its file."""
    settings = spectral_settings("spectrogram_transformer", data, bundles, tmp_path / "run", 1)
    task = DiffusionTask(config_of(settings, tmp_path))
    batch = task.examples.draw(range(6), 0)
    shape = task.model.spectrogram
    for row in range(6):
        number = int(batch["captions"][row].split()[-1]) if "number" in batch["captions"][row] else None
        hertz = 110 * (number + 1) if number is not None else int(batch["captions"][row].split()[1])
        path = data / f"{hertz // 110 - 1}.wav"
        start = float(batch["seconds_start"][row])
        audio = read_audio(path, shape.sample_rate, start, shape.seconds).mean(0)[: shape.samples]
        back = task.representation.decode(batch["x0"][row : row + 1], shape.samples)[0, 0]
        inner = slice(shape.window, len(audio) - shape.window)
        # What lies below the lowest row's middle is lost in part.
        assert float((back[inner] - audio[inner]).square().mean() / audio[inner].square().mean()) < 0.1
        assert float(batch["seconds_total"][row]) == pytest.approx(1 + 0.3 * (hertz // 110 - 1), abs=0.01)


def test_mistakes_are_one_line(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    settings = spectral_settings("spectrogram_transformer", data, bundles, tmp_path / "run", 1)
    mute = tmp_path / "mute"
    mute.mkdir()
    (mute / "0.wav").write_bytes((data / "0.wav").read_bytes())
    for change, words in (
        ({"clap": None}, "clap: .* reads text; name the CLAP"),
        ({"data": str(mute)}, "0.wav: has no caption"),
        ({"initial": str(bundles["vae"])}, "is of kind stable_audio with other data"),
    ):
        with pytest.raises(UserError, match=words):
            DiffusionTask(config_of(settings | change, tmp_path))
    plain = spectral_settings("complex_stft", data, bundles, tmp_path / "run", 1)
    with pytest.raises(UserError, match="reads no text"):
        DiffusionTask(config_of(plain | {"clap": str(bundles["clap"])}, tmp_path))


def test_training_goes_on_from_a_bundle(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    settings = spectral_settings("complex_stft", data, bundles, tmp_path / "first", 2)
    first = train_diffusion.run(config_of(settings, tmp_path))
    task = DiffusionTask(config_of(settings | {"initial": str(first)}, tmp_path))
    for key, value in load_file(first / "unet.safetensors").items():
        assert torch.equal(task.modules["model"].state_dict()[key], value), key
    other = tmp_path / "other.yaml"
    model: SystemConfig = load_system(settings["model"])
    save_config(replace(model, spectrogram=replace(model.spectrogram, scale=9.0)), other)
    with pytest.raises(UserError, match="with other data than"):
        DiffusionTask(config_of(settings | {"initial": str(first), "model": str(other)}, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_plan_knows_these(kind: str, data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(spectral_settings(kind, data, bundles, tmp_path / "run", 2)))
    found = plan(path, steps=1)
    config = load_system(ROOT / f"configs/{kind}/tiny.yaml")
    conditioner = 2 * 17 * 32 if kind == "spectrogram_transformer" else 0  # two tables of seconds 0 to 16
    assert found.trained == {"model": sum(p.numel() for p in config.network().parameters()) + conditioner}
    assert "training.train_diffusion" in found.as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_demos_are_what_the_bundle_makes(kind: str, data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    prompts = ["a tone"] if kind == "spectrogram_transformer" else []
    demos = {"every": 2, "prompts": prompts, "cfg": [2.0], "steps": 2}
    settings = spectral_settings(kind, data, bundles, tmp_path / "run", 2) | {"demos": demos}
    bundle = train_diffusion.run(config_of(settings, tmp_path))
    names = {f.stem for f in (tmp_path / "run/demos/step_00000002").glob("*.wav")}
    assert names == ({"prompt1-cfg2"} if prompts else {"sound1", "sound2", "sound3"})
    model = StableAudio.from_pretrained(bundle, device="cpu")
    made = model.generate(prompts, cfg=2.0, steps=2, seed=0) if prompts else model.generate(count=3, steps=2, seed=0)
    heard = read_audio(tmp_path / f"run/demos/step_00000002/{min(names)}.wav", 8000).mean(0)
    expected = made.audio[0, 0] / made.audio[0].abs().max().clamp_min(1.0)
    torch.testing.assert_close(heard, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_shipped_configs_are_right(path: Path) -> None:
    """Every key and value of models and of training on spectrograms; tests of the trainers read the others."""
    if path.parent.name in KINDS and path.stem.startswith("train"):
        config = load_config(path, TrainDiffusionConfig)
        assert load_system(ROOT / config.model).kind == path.parent.name
    elif path.parent.name in KINDS:
        assert load_system(path).kind == path.parent.name
