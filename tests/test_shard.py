"""Weights or gradients shared out: two processes do what one does, and their checkpoints are the same."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ONE_THREAD, ROOT, diffusion_settings, distance, load, losses, vae_settings

from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.errors import UserError
from training import train_diffusion, train_vae
from training.loop import fit
from training.shard import sharding

# Both processes write down how much they hold; the first makes the loss of a batch of step 3 NaN.
WATCHED = """
import json, math, sys, torch.distributed
from stable_audio_lite.config import load_config
from training.loop import fit
from training.train_diffusion import DiffusionTask, TrainDiffusionConfig

config = load_config(sys.argv[1], TrainDiffusionConfig)
task = DiffusionTask(config)
errors, step, calls = task.errors, task.step, []

def local(tensor):
    return getattr(tensor, "to_local", lambda: tensor)().numel()

def spoiled(batch):
    first = torch.distributed.get_rank() == 0 and torch.is_grad_enabled() and not calls.append(0)
    found, pulse = errors(batch)
    return found * (math.nan if first and len(calls) == 3 else 1.0), pulse

def watched(batch, number, update):
    figures = step(batch, number, update)
    optimizer, parameters = update.optimizers["model"], list(update.task.modules["model"].parameters())
    held = {"all": sum(p.numel() for p in parameters), "weights": sum(local(p) for p in parameters)}
    held["gradients"] = sum(local(p.grad) for p in parameters if p.grad is not None)
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    held["state"] = sum(local(v) for state in states for v in state.values() if v.ndim)
    with open(f"{config.run.output}-{torch.distributed.get_rank()}.json", "w") as file:
        json.dump(held, file)
    return figures

task.errors, task.step = spoiled, watched
fit(config.run, task, config)
"""

Settings = Callable[[str, int, int], dict[str, object]]


@pytest.fixture
def settings(bundles: dict[str, Path], tmp_path: Path) -> Settings:
    """(name, steps, batch size) -> settings of a run with two batches an update and held-out data."""

    def settings(name: str, steps: int, batch: int) -> dict[str, object]:
        chosen = diffusion_settings(bundles, tmp_path / name, steps, accumulate=2, keep_last=9)
        chosen["run"] |= {"evaluate_every": 5, "checkpoint_every": 1 if name == "one" else 10}
        return chosen | {"batch_size": batch}

    return settings


def two_processes(settings: dict[str, object], folder: Path) -> None:
    """WATCHED by the shipped launch configuration, on the CPU."""
    (folder / "watched.py").write_text(WATCHED)
    (folder / "two.yaml").write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    config = ROOT / "configs/accelerate/fsdp.yaml"
    command = [*launch, "--config_file", str(config), str(folder / "watched.py"), str(folder / "two.yaml")]
    environment = ONE_THREAD | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.long
def test_two_processes_with_half_of_it_each_equal_one(settings: Settings, tmp_path: Path) -> None:
    """One process, two from step 2 to 5 and one again, with a bad batch in step 3: as one throughout, to 1e-3."""
    optimizer = {"lr": 1e-3, "muon_lr": 0.02, "weight_decay": 0.01}
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    cls = train_diffusion.TrainDiffusionConfig
    config = load(cls, settings("one", 6, 2) | {"optimizer": optimizer}, tmp_path)
    task, calls = train_diffusion.DiffusionTask(config), []
    errors = task.errors

    def spoiled(batch: dict[str, object]) -> tuple[torch.Tensor, None]:
        first = torch.is_grad_enabled() and not calls.append(0)
        return errors(batch)[0] * (math.nan if first and len(calls) == 7 else 1.0), None

    task.errors = spoiled
    fit(config.run, task, config)
    shutil.copytree(one / "checkpoints/step_00000002", two / "checkpoints/step_00000002")
    demos = {"every": 5, "prompts": ["a tone"], "cfg": [1.0], "seconds": 0.3, "steps": 2}
    two_processes(settings("two", 5, 1) | {"optimizer": optimizer, "demos": demos}, tmp_path)
    shutil.copytree(two / "checkpoints/step_00000005", again / "checkpoints/step_00000005")
    train_diffusion.run(load(cls, settings("again", 6, 2) | {"optimizer": optimizer}, tmp_path))
    for run, steps in ((two, (2, 3, 4)), (again, (5,))):
        ours, theirs = losses(one), losses(run)
        for step in steps:
            for key in ("grad_norm/model", "updates/skipped", *(("loss/v",) if step != 3 else ())):
                assert theirs[step][key] == pytest.approx(ours[step][key], rel=1e-3), (step, key)
    assert losses(two)[4]["updates/skipped"] == 1
    for run, step in ((two, "step_00000005"), (again, "step_00000006")):
        files = sorted((one / "checkpoints" / step).glob("*.safetensors"))
        assert [f.stem for f in files] == ["ema_model", "model", "optimizer_model"]
        for file in files:
            whole, theirs = load_file(file), load_file(run / "checkpoints" / step / file.name)
            assert {k: (v.shape, v.dtype) for k, v in whole.items()} == {
                k: (v.shape, v.dtype) for k, v in theirs.items()
            }
            assert distance(whole, theirs) < 1e-3, (step, file.name)
    average = load_file(two / "checkpoints/step_00000005/ema_model.safetensors")
    for bundle in ("best", "bundle"):
        exported = load_file(two / bundle / "unet.safetensors")
        assert all(torch.equal(value, average[f"network.{name}"]) for name, value in exported.items())
    assert float(read_audio(two / "demos/step_00000005/prompt1-cfg1.wav", 44100).std()) > 0
    held = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    state = load_file(two / "checkpoints/step_00000005/optimizer_model.safetensors").values()
    whole = {"state": sum(value.numel() for value in state if value.ndim)}
    whole |= {"weights": held[0]["all"], "gradients": held[0]["all"]}
    for name, count in whole.items():
        assert sum(h[name] for h in held) == count and all(0.45 < h[name] / count < 0.55 for h in held), name


def test_what_can_not_be_shared_out_is_refused(
    data: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the key of the launch configuration."""
    parts = {torch.nn.Linear: ()}
    for key, given, words in (
        ("FSDP_VERSION", "1", "fsdp_version: must be 2, got 1; see configs/accelerate/fsdp.yaml"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: must be false, got true"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED is not supported; see configs/accelerate/fsdp.yaml"),
    ):
        with monkeypatch.context() as environment, pytest.raises(UserError, match=words):
            environment.setenv("ACCELERATE_USE_FSDP", "true")
            environment.setenv(key, given)
            sharding(parts)
    with monkeypatch.context() as environment, pytest.raises(UserError, match="FSDP is for the U-Net"):
        environment.setenv("ACCELERATE_USE_FSDP", "true")
        train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 1), tmp_path))
