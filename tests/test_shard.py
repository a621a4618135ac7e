"""Sharded weights: two processes that hold half each do what one does, and checkpoints are the same either way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ONE_THREAD, ROOT, diffusion_settings, distance, load, losses

from stable_audio_lite.audio.io import read_audio
from training import train_diffusion

FSDP = ROOT / "configs/accelerate/fsdp.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
WATCHED = """
import json, sys, torch.distributed
from pathlib import Path
from stable_audio_lite.config import load_config
from training import loop, train_diffusion

config = load_config(sys.argv[1], train_diffusion.TrainDiffusionConfig)
task = train_diffusion.DiffusionTask(config)
step, held = task.step, {}

def watched(batch, number, update):
    figures = step(batch, number, update)
    optimizer = update.optimizers["model"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held["weights"] = sum(p.to_local().numel() for p in parameters)
    held["gradients"] = sum(p.grad.to_local().numel() for p in parameters)
    held["state"] = sum(v.to_local().numel() for s in optimizer.state.values() for v in s.values() if v.ndim)
    held["whole"] = sum(p.numel() for p in parameters)
    Path(f"{config.run.output}-{torch.distributed.get_rank()}.json").write_text(json.dumps(held))
    return figures

task.step = watched
loop.fit(config.run, task, config)
"""


def test_two_processes_with_half_the_weights_equal_one(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """One process, then two sharded ones from step 2 on, then one again from step 6: as one throughout, to 1e-3."""
    demos = {"every": 4, "prompts": ["a tone"], "cfg": [1.0], "seconds": 0.3, "steps": 2}

    def settings(name: str, steps: int, batch: int) -> dict[str, object]:
        settings = diffusion_settings(bundles, tmp_path / name, steps, accumulate=2, checkpoint_every=2, keep_last=9)
        settings["run"]["evaluate_every"] = 2
        return settings | {"optimizer": {"lr": 1e-3, "muon_lr": 0.02}, "demos": demos, "batch_size": batch}

    cls, one, two, again = train_diffusion.TrainDiffusionConfig, *(tmp_path / name for name in ("one", "two", "again"))
    train_diffusion.run(load(cls, settings("one", 8, 2), tmp_path))
    shutil.copytree(one / "checkpoints/step_00000002", two / "checkpoints/step_00000002")
    launch(settings("two", 6, 1), tmp_path)
    shutil.copytree(two / "checkpoints/step_00000006", again / "checkpoints/step_00000006")
    train_diffusion.run(load(cls, settings("again", 8, 2), tmp_path))
    for run, steps in ((two, range(2, 6)), (again, range(6, 8))):
        ours, theirs = losses(one), losses(run)
        for step in steps:
            for key in (k for k in ours[step] if not k.startswith("loss/v_t")):
                assert theirs[step][key] == pytest.approx(ours[step][key], rel=1e-3, abs=1e-4), (step, key)
    for run, step in ((two, "step_00000006"), (again, "step_00000008")):
        files = sorted((one / "checkpoints" / step).glob("*.safetensors"))
        assert [f.name for f in files] == ["ema_model.safetensors", "model.safetensors", "optimizer_model.safetensors"]
        for file in files:
            whole, theirs = load_file(file), load_file(run / "checkpoints" / step / file.name)
            assert {k: v.shape for k, v in whole.items()} == {k: v.shape for k, v in theirs.items()}
            assert distance(whole, theirs) < 1e-3, (step, file.name)
    average = load_file(two / "checkpoints/step_00000006/ema_model.safetensors")
    for name, value in load_file(two / "bundle/unet.safetensors").items():
        assert torch.equal(value, average[f"unet.{name}"]), name
    for name, value in load_file(one / "best/unet.safetensors").items():
        assert value.shape == load_file(two / "best/unet.safetensors")[name].shape
    demos = [read_audio(run / "demos/step_00000004/prompt1-cfg1.wav", 44100) for run in (one, two)]
    torch.testing.assert_close(*demos, rtol=0, atol=1e-2)
    held = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    for kind in ("weights", "gradients"):
        assert sum(h[kind] for h in held) == held[0]["whole"]
        assert all(0.4 < h[kind] / held[0]["whole"] < 0.6 for h in held)
    print(held)


def launch(settings: dict[str, object], folder: Path) -> None:
    """Two processes by the shipped configuration, on the CPU."""
    (folder / "watched.py").write_text(WATCHED)
    (folder / "two.yaml").write_text(yaml.safe_dump(settings))
    command = [*LAUNCH, "--config_file", str(FSDP), str(folder / "watched.py"), str(folder / "two.yaml")]
    environment = ONE_THREAD | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
