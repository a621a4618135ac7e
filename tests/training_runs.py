"""Settings of short runs of every trainer, how to stop and kill them, and how to compare what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from stable_audio_lite.config import load_config
from training import train_clap, train_diffusion, train_vae

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs/stable_audio/tiny.yaml"
TOLERANCE = 1e-6
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

Settings = Callable[..., dict[str, object]]


def run_settings(output: Path, steps: int, **more: object) -> dict[str, object]:
    settings = {"output": str(output), "steps": steps, "log_every": 1, "checkpoint_every": 10, "tracker": "none"}
    return settings | {"ema_decay": 0.99} | more


def vae_settings(data: Path, output: Path, steps: int, **more: object) -> dict[str, object]:
    return {
        "model": str(TINY),
        "data": str(data),
        "crop_frames": 8,
        "batch_size": 2,
        "stft_windows": [512, 128],
        "optimizer": {"lr": 1e-3, "muon_lr": 0.02, "warmup_steps": 5},
        "weights": {
            **{"waveform/relative": 1.0, "stft/sum": 1.0, "stft/difference": 1.0, "stft/left": 0.5, "stft/right": 0.5},
            **{"kl/latent": 1e-4, "adversarial/generator": 0.1, "adversarial/features": 5.0},
        },
        "discriminator": {"windows": [256], "filters": 4},
        "discriminator_optimizer": {"lr": 1e-3},
        "discriminator_start": 3,
        "run": run_settings(output, steps, **more),
    }


def clap_settings(data: Path, output: Path, steps: int, **more: object) -> dict[str, object]:
    return {
        "model": str(TINY),
        "data": [str(data)],
        "batch_size": 3,
        "language": 0.5,
        "optimizer": {"lr": 1e-3},
        "run": run_settings(output, steps, **more),
    }


def diffusion_settings(bundles: dict[str, Path], output: Path, steps: int, **more: object) -> dict[str, object]:
    return {
        "model": str(TINY),
        **{k: str(v) for k, v in bundles.items()},
        "latents": [str(bundles["latents"])],
        "held_out": str(bundles["latents"]),
        "batch_size": 4,
        "optimizer": {"lr": 1e-3, "warmup_steps": 5},
        "run": run_settings(output, steps, evaluate_every=10, **more),
    }


def load(cls: type, settings: dict[str, object], folder: Path) -> object:
    path = folder / f"{cls.__name__}-{random.getrandbits(32)}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path, cls)


def trainer_of(name: str, data: Path, bundles: dict[str, Path]) -> tuple[object, type, Settings]:
    """A trainer's module, its config's class and (output, steps, ...) -> settings."""
    return {
        "vae": (train_vae, train_vae.TrainVAEConfig, partial(vae_settings, data)),
        "clap": (train_clap, train_clap.TrainClapConfig, partial(clap_settings, data)),
        "diffusion": (train_diffusion, train_diffusion.TrainDiffusionConfig, partial(diffusion_settings, bundles)),
    }[name]


def forget_precision() -> None:
    """Let this process run with another number type, which accelerate keeps from its first run on."""
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(output: Path) -> dict[int, dict[str, float]]:
    """The last row of each step without its speed."""
    rows = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    return {int(r["step"]): {k: v for k, v in r.items() if k != "items_per_second"} for r in rows}


def assert_same_curve(one: Path, other: Path, first: int, last: int) -> None:
    a, b = losses(one), losses(other)
    assert set(range(first, last)) <= a.keys() & b.keys()
    for step in range(first, last):
        assert a[step] == pytest.approx(b[step], rel=TOLERANCE, abs=TOLERANCE), step


def assert_same_weights(one: Path, other: Path) -> None:
    for path in sorted(one.glob("*.safetensors")):
        theirs = load_file(other / path.name)
        for key, value in load_file(path).items():
            torch.testing.assert_close(value, theirs[key], rtol=TOLERANCE, atol=TOLERANCE)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors of `one` to those of the same name, relative to their norm."""
    size = torch.cat([v.flatten().float() for v in one.values()]).norm()
    return float(torch.cat([(v - other[k]).flatten().float() for k, v in one.items()]).norm() / size)


def stop_after(config: object, trainer: object, step: int) -> None:
    """Run until the loop asks for the batch after `step`, then fail as a kill would: without clean-up of the run."""
    original = trainer.fit

    def fit(run: object, task: object, whole: object) -> Path:
        batch = task.batch

        def failing(number: int, rank: int, world: int) -> object:
            if number > step:
                raise InterruptedError
            return batch(number, rank, world)

        task.batch = failing
        return original(run, task, whole)

    trainer.fit = fit
    try:
        with pytest.raises(InterruptedError):
            trainer.run(config)
    finally:
        trainer.fit = original


def kill(command: list[str], begun: Callable[[], bool], within: float) -> None:
    """Start a command and send it SIGKILL at a random moment of the `within` seconds after it has `begun`."""
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not begun() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() * within)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
