"""The loop: killed runs go on exactly, NaN is skipped or ends a run, processes and batches add up."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from training_runs import (
    ONE_THREAD,
    ROOT,
    assert_same_curve,
    assert_same_weights,
    clap_settings,
    diffusion_settings,
    distance,
    forget_precision,
    kill,
    load,
    losses,
    stop_after,
    trainer_of,
    vae_settings,
)

from stable_audio_lite.bundle import SHIPPED
from stable_audio_lite.codec import Codec
from stable_audio_lite.config import load_config, read_yaml
from stable_audio_lite.devices import choose_dtype
from stable_audio_lite.errors import UserError
from training import assemble, command, distill, pre_encode, train_clap, train_diffusion, train_vae
from training.checkpoint import Resumable, checkpoints, load_checkpoint, save_checkpoint, tidy
from training.loop import _checkpoint, _resume
from training.task import RunConfig, device_to_train_on
from training.update import Update


def test_what_fades_away_costs_no_time(data: Path, tmp_path: Path) -> None:
    """Averages and momenta become denormal in long runs, and products of those are slow: they count as zero."""
    torch.set_flush_denormal(False)
    least = torch.full((64,), 1e-38)
    assert (least * 0.1).abs().min() > 0
    train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "vae", 1), tmp_path))
    assert (least * 0.1).abs().max() == 0


@pytest.mark.parametrize("name", ["vae", "clap", "diffusion"])
def test_resumed_equals_uninterrupted(name: str, data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Stopped at step 10 and started again, the next 20 steps' losses and the final weights are the same."""
    trainer, cls, settings = trainer_of(name, data, bundles)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.run(load(cls, settings(whole, 30), tmp_path))
    stop_after(load(cls, settings(parts, 30), tmp_path), trainer, step=13)
    assert checkpoints(parts / "checkpoints")[-1].name == "step_00000010"
    (parts / "checkpoints/.step_00000020-left").mkdir()  # by a run that was killed while it wrote
    trainer.run(load(cls, settings(parts, 30), tmp_path))
    assert not list((parts / "checkpoints").glob(".*"))
    assert_same_curve(whole, parts, 10, 30)
    assert_same_weights(whole / "bundle", parts / "bundle")


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "kills", "steps"), [("vae", 3, 80), ("clap", 1, 60), ("diffusion", 1, 60)])
def test_killed_trainer_goes_on(
    name: str, kills: int, steps: int, data: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL at random moments leaves whole checkpoints only; the same command ends as an uninterrupted run does."""
    trainer, cls, settings = trainer_of(name, data, bundles)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(settings(killed, steps, checkpoint_every=5)))
    command = [sys.executable, "-m", trainer.__name__, "--config", str(config)]
    for _ in range(kills):
        before = checkpoints(killed / "checkpoints")[-1:]
        kill(command, lambda before=before: checkpoints(killed / "checkpoints")[-1:] != before, within=0.5)
    assert checkpoints(killed / "checkpoints") and not (killed / "bundle").exists()
    subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    trainer.run(load(cls, settings(whole, steps), tmp_path))
    assert_same_curve(whole, killed, 0, steps)
    assert_same_weights(whole / "bundle", killed / "bundle")


def vae_task_with_nans(config: object, bad: Callable[[int], bool]) -> train_vae.VAETask:
    """The task of `config`, whose losses are NaN in batches number 0, 1, ... for which `bad` is true."""
    task = train_vae.VAETask(config)
    measure, calls = task.reconstruction, itertools.count()

    def spoiled(output: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = float("nan") if bad(next(calls)) else 1.0
        return {name: loss * factor for name, loss in measure(output, target).items()}

    task.reconstruction = spoiled
    return task


def test_bad_steps_are_skipped_and_counted(data: Path, tmp_path: Path) -> None:
    """The update of a step with NaN leaves the weights alone; the run goes on and ends."""
    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 15), tmp_path)
    task = vae_task_with_nans(config, lambda call: call in (6, 7, 12))
    before = {}
    step = task.step

    def watched(batch: object, number: int, update: object) -> dict[str, torch.Tensor]:
        before[number] = {k: v.clone() for k, v in task.modules["vae"].state_dict().items()}
        return step(batch, number, update)

    task.step = watched
    train_vae.fit(config.run, task, config)
    for number in (6, 7, 12):
        assert all(torch.equal(v, before[number + 1][k]) for k, v in before[number].items())
    assert any(not torch.equal(v, before[9][k]) for k, v in before[8].items())
    curve = losses(tmp_path / "run")
    assert [curve[s]["updates/skipped"] for s in (5, 7, 14)] == [0, 2, 3]
    assert curve[14]["updates/returns"] == 0


def test_many_bad_steps_return_to_the_checkpoint_at_half_rate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five NaN in a row: back to the checkpoint of step 10, half the rate, which a resumed run keeps."""
    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 30), tmp_path)
    task = vae_task_with_nans(config, lambda call: 12 <= call < 17)
    train_vae.fit(config.run, task, config)
    curve = losses(tmp_path / "run")
    assert curve[29]["updates/skipped"] == 5
    assert curve[29]["updates/returns"] == 1
    assert "back to" in capsys.readouterr().err
    state = json.loads((checkpoints(tmp_path / "run/checkpoints")[-1] / "state.json").read_text())
    assert state["health"] == {"skipped": 5, "in_a_row": 0, "returns": 1, "best": None}
    longer = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 31), tmp_path)
    task = train_vae.VAETask(longer)
    updates = []
    step = task.step

    def watched(batch: object, number: int, update: object) -> dict[str, torch.Tensor]:
        updates.append(update)
        return step(batch, number, update)

    task.step = watched
    train_vae.fit(longer.run, task, longer)
    assert [u.optimizers["vae"].param_groups[1]["lr"] for u in updates] == pytest.approx([0.5 * longer.optimizer.lr])


def test_a_bad_start_is_tried_again_at_half_rate(data: Path, tmp_path: Path) -> None:
    """Before the first checkpoint that was asked for there is that of the beginning, with the weights as drawn."""
    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 12), tmp_path)
    task = vae_task_with_nans(config, lambda call: 1 <= call < 6)
    before = {k: v.clone() for k, v in task.modules["vae"].state_dict().items()}
    seen, step = [], task.step

    def watched(batch: object, number: int, update: object) -> dict[str, torch.Tensor]:
        if number == 0:
            seen.append({k: v.clone() for k, v in task.modules["vae"].state_dict().items()})
        return step(batch, number, update)

    task.step = watched
    train_vae.fit(config.run, task, config)
    assert len(seen) == 2 and all(torch.equal(first[k], v) for first in seen for k, v in before.items())
    assert losses(tmp_path / "run")[11]["updates/returns"] == 1


def test_endless_nan_ends_with_the_checkpoint_named(data: Path, tmp_path: Path) -> None:
    settings = vae_settings(data, tmp_path / "run", 30, max_returns=1)
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = vae_task_with_nans(config, lambda call: call >= 12)
    with pytest.raises(UserError, match=r"not finite in the 5 steps up to \d+; last good checkpoint: .*step_00000010"):
        train_vae.fit(config.run, task, config)


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_that_ends_with_broken_weights_says_so(broken: bool, data: Path, tmp_path: Path) -> None:
    """Though it is too short for `max_bad_steps`, or none of its steps saw what the last update did."""
    settings = vae_settings(data, tmp_path / "run", 3, max_returns=1, ema_decay=0)
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = vae_task_with_nans(config, lambda call: call > 0 and not broken)
    rate = task.rate
    task.rate = lambda name, step, steps: float("nan") if broken and step == 2 else rate(name, step, steps)
    words = "vae ended with weights that are not finite" if broken else "not finite in the 3 steps up to 2; last good"
    with pytest.raises(UserError, match=rf"{words}.* [Ll]ower lr \(0.001\) of vae, muon_lr \(0.02\) of vae"):
        train_vae.fit(config.run, task, config)
    assert not (tmp_path / "run/bundle").exists()


def test_accumulated_gradients_equal_a_larger_batch(data: Path, tmp_path: Path) -> None:
    """Two batches of 2 for each update, discriminator included: the same curve and weights as with batches of 4."""
    few = {"discriminator_optimizer": {"lr": 1e-6}}  # Adam's first updates are signs, which rounding flips
    one = vae_settings(data, tmp_path / "one", 6) | few | {"batch_size": 4}
    two = vae_settings(data, tmp_path / "two", 6, accumulate=2) | few
    for settings in (one, two):
        train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    ours, theirs = losses(tmp_path / "one"), losses(tmp_path / "two")
    for step in range(6):
        for key in (k for k in ours[step] if not k.startswith("latent/")):
            assert ours[step][key] == pytest.approx(theirs[step][key], rel=1e-3, abs=1e-4), (step, key)
    one_vae, two_vae = (load_file(tmp_path / name / "bundle/vae.safetensors") for name in ("one", "two"))
    assert distance(one_vae, two_vae) < 1e-3


def test_one_bad_batch_spoils_its_update(data: Path, tmp_path: Path) -> None:
    """NaN in the first of two accumulated batches: no weight moves, one update is counted."""
    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 1, accumulate=2), tmp_path)
    task = vae_task_with_nans(config, lambda call: call == 0)
    before = {k: v.clone() for k, v in task.modules["vae"].state_dict().items()}
    train_vae.fit(config.run, task, config)
    assert all(torch.equal(v, before[k]) for k, v in task.modules["vae"].state_dict().items())
    assert losses(tmp_path / "run")[0]["updates/skipped"] == 1


def test_best_weights_are_kept(data: Path, tmp_path: Path) -> None:
    """The bundle `best` holds the averaged weights of the best evaluation, over a restart too."""
    for steps in (10, 20):
        settings = vae_settings(data, tmp_path / "run", steps, evaluate_every=5, checkpoint_every=5, keep_last=9)
        config = load(train_vae.TrainVAEConfig, settings, tmp_path)
        task = train_vae.VAETask(config)
        task.evaluate = lambda step: {"held_out/stft/sum": {4: 3.0, 9: 1.0, 14: 2.0, 19: float("nan")}[step]}
        train_vae.fit(config.run, task, config)
    best = load_file(tmp_path / "run/best/vae.safetensors")
    average = load_file(tmp_path / "run/checkpoints/step_00000010/ema_vae.safetensors")
    assert all(torch.equal(value, average[key]) for key, value in best.items())


def test_the_best_is_remembered_over_a_return(data: Path, tmp_path: Path) -> None:
    """Better than before the checkpoint, worse than after it: what is measured again after a return is not the best."""
    settings = vae_settings(data, tmp_path / "run", 20, evaluate_every=4)
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = vae_task_with_nans(config, lambda call: 12 <= call < 17)
    figures, exported = iter((3.0, 2.0, 1.0, 1.5, 1.6, 1.7, 1.8)), []  # the last three after the return to step 10
    task.evaluate = lambda step: {"held_out/stft/sum": next(figures)}
    export = task.export
    task.export = lambda folder, modules: (exported.append(folder.name), export(folder, modules))
    train_vae.fit(config.run, task, config)
    assert exported == ["best", "best", "best", "bundle"] and next(figures, None) is None
    assert losses(tmp_path / "run")[19]["updates/returns"] == 1


def test_a_tracker_that_is_not_installed_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 1, tracker="wandb"), tmp_path)
    monkeypatch.setattr("training.loop.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker: wandb is not installed; pip install wandb"):
        train_vae.run(config)


def test_a_tracker_that_wants_a_login_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("api_key not configured\n  call login")

    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 1, tracker="tensorboard"), tmp_path)
    monkeypatch.setattr("training.loop.Accelerator.init_trackers", refuse)
    with pytest.raises(UserError, match="tensorboard can't start, log in to it or choose none .api_key not configured"):
        train_vae.run(config)


def test_damage_and_mismatch_are_two_messages(tmp_path: Path) -> None:
    """A whole checkpoint is never to be removed; a damaged one is, and what is then gone on from is named."""
    small, large = (Resumable({"net": torch.nn.Linear(width, 2)}, {}, {}) for width in (2, 3))
    for step in (1, 2):
        save_checkpoint(tmp_path, step, small, {})
    first, second = checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"step_00000002: does not fit .*size mismatch.*the checkpoint is whole") as fit:
        load_checkpoint(second, large)
    assert "remove" not in str(fit.value)
    cut = (second / "net.safetensors").read_bytes()[:-3]
    for path, advice in ((second, "go on from step_00000001"), (first, "start anew")):
        (path / "net.safetensors").write_bytes(cut)
        with pytest.raises(UserError, match=rf"net.safetensors: damaged \(.*\); remove \S*{path.name} to {advice}$"):
            load_checkpoint(path, small)
        (path / "net.safetensors").unlink()
        with pytest.raises(UserError, match=rf"net.safetensors: missing; .* to {advice}$"):
            load_checkpoint(path, small)
        (path / "state.json").write_text('{"step"')
        with pytest.raises(UserError, match="state.json: damaged"):
            load_checkpoint(path, small)


def test_a_second_run_is_kept_out_and_a_killed_one_keeps_nobody_out(
    data: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Of a trainer and of pre-encoding alike; the process that is at work is named."""
    code = f"import time\nfrom stable_audio_lite.files import locked\nwith locked({str(tmp_path)!r}): time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
            assert other.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path, 1), tmp_path.parent)
        encoding = pre_encode.PreEncodeConfig(vae=str(bundles["vae"]), data=str(data), output=str(tmp_path))
        for trainer, settings in ((train_vae, config), (pre_encode, encoding)):
            with pytest.raises(UserError, match=f"output: process {other.pid} is at work in {tmp_path}"):
                trainer.run(settings)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()
    train_vae.run(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_a_checkpoint(
    number: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second step: it is ended and saved, one line says so, the status is the signal's, and the run goes on."""
    whole, parts = (vae_settings(data, tmp_path / name, 4) for name in ("whole", "parts"))
    for settings in (whole, parts):
        settings["discriminator_start"] = 0
    train_vae.run(load(train_vae.TrainVAEConfig, whole, tmp_path))
    file = tmp_path / "parts.yaml"
    file.write_text(yaml.safe_dump(parts))
    monkeypatch.setattr(sys, "argv", ["train_vae", "--config", str(file)])
    handlers, step = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], train_vae.VAETask.step

    def interrupted(task: train_vae.VAETask, batch: object, index: int, update: Update) -> dict[str, torch.Tensor]:
        if index == 1:
            os.kill(os.getpid(), number)
        return step(task, batch, index, update)

    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
            patched.setattr(train_vae.VAETask, "step", interrupted)
            command.main("", train_vae.TrainVAEConfig, train_vae.run)
        assert ended.value.code == 128 + number
        assert [path.name for path in checkpoints(tmp_path / "parts/checkpoints")][-1] == "step_00000002"
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("stopped after step 2 of 4; the same command goes on from ") and "step_00000002" in last
        assert signal.getsignal(signal.SIGINT) == handlers[1]
    finally:
        signal.signal(signal.SIGTERM, handlers[0])
    train_vae.run(load(train_vae.TrainVAEConfig, parts, tmp_path))
    assert_same_curve(tmp_path / "whole", tmp_path / "parts", 0, 4)
    assert_same_weights(tmp_path / "whole/bundle", tmp_path / "parts/bundle")


def test_a_run_says_what_it_is_about_to_do(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes, device, number type, where it resumes, and each setting that is another one than before."""
    settings = vae_settings(data, tmp_path / "run", 1)
    train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    device = Accelerator().device.type
    assert f"1 process on {device}, float32, {tmp_path / 'run'}: from step 0 to 1\n" in capsys.readouterr().err
    changed = settings | {"batch_size": 3, "run": settings["run"] | {"steps": 2, "precision": "bf16"}}
    forget_precision()
    try:
        train_vae.run(load(train_vae.TrainVAEConfig, changed, tmp_path))
    finally:
        forget_precision()
    words = "from step 1 to 2; batch_size was 2, is 3; run.steps was 1, is 2; run.precision was no, is bf16\n"
    assert f"1 process on {device}, bf16, {tmp_path / 'run'}: {words}" in capsys.readouterr().err


def test_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / ".step_00000006-x").mkdir()
    assert checkpoints(tmp_path) == []
    tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_scaled_loss_gives_the_same_updates_and_overflow_is_not_bad(data: Path, tmp_path: Path) -> None:
    """With fp16's loss scaling, two networks and two batches: the norms without it; an overflow lowers the scale."""

    def step(scale: float | None) -> Update:
        settings = vae_settings(data, tmp_path / "run", 1, accumulate=2) | {"discriminator_start": 0}
        config = load(train_vae.TrainVAEConfig, settings, tmp_path)
        accelerator, task = Accelerator(), train_vae.VAETask(config)
        accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        optimizers = {name: c.build(task.modules[name]) for name, c in task.optimizers.items()}
        update = Update(accelerator, config.run, task, optimizers)
        update.begin(0)
        for number in range(2):
            task.step(task.batch(number, 0, 1), 0, update)
        assert not update.end()
        return update

    plain, scaled, burst = step(None), step(2.0**12), step(2.0**127)
    assert len(plain.grad_norms) == 2
    for name, norm in plain.grad_norms.items():
        assert float(scaled.grad_norms[name]) == pytest.approx(float(norm), rel=1e-3), name
    assert (burst.health.skipped, burst.bad, burst.scaler.get_scale()) == (0, False, 2.0**126)
    # The same where it happens between the two networks, so that the loss itself comes out as NaN.
    burst.begin(1)
    at = torch.ones(2, requires_grad=True)
    gradient = burst.gradient((1e10 * at).sum(), at)
    burst("vae", (0 * gradient).sum())
    assert not burst.end() and (burst.health.skipped, burst.bad) == (0, False)
    assert burst.scaler.get_scale() == 2.0**125
    # The scale goes on from a checkpoint.
    state = Resumable(burst.task.modules, burst.optimizers, {})
    _checkpoint(burst.run, 1, state, burst, {})
    assert _resume(tmp_path / "run/checkpoints/step_00000001", state, scaled) == 1
    assert scaled.scaler.get_scale() == 2.0**125


def test_shipped_configs_are_right() -> None:
    """Every key and value; the paper's decoder phase has what its joint phase had, but for what makes it the second."""
    classes = {
        "train_vae": train_vae.TrainVAEConfig,
        "train_diffusion": train_diffusion.TrainDiffusionConfig,
        "train_clap": train_clap.TrainClapConfig,
        "pre_encode": pre_encode.PreEncodeConfig,
        "assemble": assemble.AssembleConfig,
        "distill": distill.DistillConfig,
    }
    folder, loaded = ROOT / "configs/stable_audio", {}
    for path in folder.glob("*.yaml"):
        for cls in (cls for start, cls in classes.items() if path.stem.startswith(start)):
            loaded[path.stem] = asdict(load_config(path, cls))
    assert len(loaded) == len(list(folder.glob("*.yaml"))) - len(("paper", "starter", "starter_vae", "tiny"))
    first, second = loaded["train_vae_paper"], loaded["train_vae_paper_decoder"]
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"initial", "continues", "freeze_encoder", "run"}


def test_a_vae_alone_can_be_put_in_place(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Its weights are those of its run, in 16 bits; what documents it there stays."""
    for name in ("README.md", "curves.png"):
        (tmp_path / name).write_text(name)
        assemble.run(assemble.AssembleConfig(bundle=str(bundles["vae"]), output=str(tmp_path)))
    stored = load_file(tmp_path / "vae.safetensors")
    assert all(torch.equal(stored[k], v.half()) for k, v in load_file(bundles["vae"] / "vae.safetensors").items())
    assert all((tmp_path / name).read_text() == name for name in ("README.md", "curves.png"))
    assert Codec.from_pretrained(tmp_path, "cpu", "float32").vae.hop == 1024


def test_shipped_bundles_are_not_written_over(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way their folder is given; and no config that the README's commands use names a place among them."""
    before = {path: path.stat().st_mtime_ns for folder in SHIPPED.values() for path in folder.glob("*")}
    monkeypatch.chdir(ROOT)
    for output in (SHIPPED["starter"], "stable_audio_lite/starter", "configs/../stable_audio_lite/starter_vae/"):
        with pytest.raises(
            UserError, match=r"output: \S+ is the shipped starter(-vae)? with its card; choose a new folder"
        ):
            assemble.run(assemble.AssembleConfig(bundle=str(bundles["vae"]), output=str(output)))
    for name in ("vae", "clap"):
        with pytest.raises(UserError, match="is the bundle that is read; choose a new folder"):
            settings = {"bundle": str(bundles["clap"]), "vae": str(bundles["vae"]), "output": str(bundles[name])}
            assemble.run(assemble.AssembleConfig(**settings))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in (ROOT / "configs").glob("*/*.yaml"):
        config = read_yaml(path)
        for output in (config.get("output"), (config.get("run") or {}).get("output")):
            assert (ROOT / "stable_audio_lite") not in Path(output or "runs").resolve().parents, path


def test_no_other_config_is_written_over(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Of a bundle in the place of a run, or the file itself that the settings are in."""
    shutil.copytree(bundles["vae"], bundle := tmp_path / "bundle")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(vae_settings(data, tmp_path, 1)))
    for output in (bundle, tmp_path):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        config = load_config(tmp_path / "config.yaml", train_vae.TrainVAEConfig)
        with pytest.raises(UserError, match="config.yaml is no run's, for there are no checkpoints"):
            train_vae.run(replace(config, run=replace(config.run, output=str(output))))
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_does_not_go_together_is_not_assembled(bundles: dict[str, Path], tmp_path: Path) -> None:
    for name, other, words in (
        ("vae", str(bundles["vae"]), "holds no VAE that another could take the place of"),
        ("model", "complex_stft/tiny", "complex_stft/tiny is of kind complex_stft, .* of kind stable_audio"),
    ):
        settings = {"bundle": str(bundles["clap"]), "output": str(tmp_path / "out"), name: other}
        with pytest.raises(UserError, match=words):
            assemble.run(assemble.AssembleConfig(**settings))
    assert not (tmp_path / "out").exists()


def test_a_missing_stage_is_named(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """By the trainer to run first; the folder of a run in the place of its bundle is told apart."""
    none, run = str(tmp_path / "runs/none/bundle"), str(bundles["vae"].parent)
    vae, clap = vae_settings(data, tmp_path / "run", 1), clap_settings(data, tmp_path / "run", 1)
    diffusion = diffusion_settings(bundles, tmp_path / "run", 1)
    encoding, release = (
        {"vae": none, "data": str(data), "output": str(tmp_path / "run")},
        {"output": str(tmp_path / "run")},
    )
    missing = "is not there yet; run training"
    for trainer, cls, settings, words in (
        (train_vae, train_vae.TrainVAEConfig, vae | {"initial": none}, f"initial: .*{missing}.train_vae"),
        (train_clap, train_clap.TrainClapConfig, clap | {"initial": none}, f"initial: .*{missing}.train_clap"),
        (
            train_diffusion,
            train_diffusion.TrainDiffusionConfig,
            diffusion | {"vae": none},
            f"vae: .*{missing}.train_vae",
        ),
        (
            train_diffusion,
            train_diffusion.TrainDiffusionConfig,
            diffusion | {"clap": none},
            f"clap: .*{missing}.train_cl",
        ),
        (
            train_diffusion,
            train_diffusion.TrainDiffusionConfig,
            diffusion | {"initial": none},
            f"{missing}.train_diffusion",
        ),
        (
            train_diffusion,
            train_diffusion.TrainDiffusionConfig,
            diffusion | {"latents": [none]},
            "run training.pre_encode",
        ),
        (
            train_diffusion,
            train_diffusion.TrainDiffusionConfig,
            diffusion | {"vae": run},
            f"of a run; give {run}/bundle",
        ),
        (pre_encode, pre_encode.PreEncodeConfig, encoding, f"vae: .*{missing}.train_vae"),
        (assemble, assemble.AssembleConfig, release | {"bundle": none}, f"bundle: .*{missing}.train_diffusion"),
        (
            assemble,
            assemble.AssembleConfig,
            release | {"bundle": str(bundles["vae"]), "vae": none},
            "run training.train_vae",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            trainer.run(load(cls, settings, tmp_path))
        assert " -o" not in str(caught.value) and "YAML" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_precision_is_what_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided for the device when the run starts; what is named outright stays."""
    cpu = torch.device("cpu")
    for able, wanted in ((False, "no"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert RunConfig(output="run", steps=1, precision="auto").precision_on(cpu) == wanted
        assert RunConfig(output="run", steps=1, precision="bf16").precision_on(cpu) == "bf16"


def test_half_precision_needs_a_gpu(data: Path, tmp_path: Path) -> None:
    config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "run", 1, precision="fp16"), tmp_path)
    forget_precision()
    try:
        with pytest.raises(UserError, match="precision: fp16 needs a GPU"):
            train_vae.run(config)
    finally:
        forget_precision()


def test_a_processor_that_accelerate_is_told_to_use_decides_on_the_number_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is a GPU beside it."""
    monkeypatch.setattr("training.task.choose_device", lambda name: torch.device("cuda"))
    assert device_to_train_on().type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_to_train_on().type == "cpu"


@pytest.mark.long
def test_two_processes_choose_the_number_type_of_their_device(
    data: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    trainer, _, settings = trainer_of("diffusion", data, bundles)
    (config := tmp_path / "auto.yaml").write_text(yaml.safe_dump(settings(tmp_path / "auto", 2, precision="auto")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", trainer.__name__, "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD | {"ACCELERATE_USE_CPU": "true"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    kind = str(choose_dtype(None, torch.device("cpu"))).removeprefix("torch.").replace("bfloat16", "bf16")
    assert f"2 processes on cpu, {kind}, " in done.stderr.decode()


@pytest.mark.long
@pytest.mark.parametrize("name", ["vae", "diffusion"])
def test_two_processes_equal_one_with_the_doubled_batch(
    name: str, data: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Over gloo on the CPU, after 8 steps and the discriminator's start: the same curve to 1e-3, gradients to 1 %."""
    trainer, cls, settings = trainer_of(name, data, bundles)
    one, two = settings(tmp_path / "one", 8), settings(tmp_path / "two", 8)
    one["batch_size"] *= 2
    if name == "vae":  # Adam's first updates are the gradient's signs, which rounding flips: keep them small
        one["discriminator_optimizer"] = two["discriminator_optimizer"] = {"lr": 1e-6}
    else:  # a process then often has no item of some noise level, and still logs it
        one["batch_size"], two["batch_size"], one["lowest_time"], two["lowest_time"] = 4, 2, 0.4, 0.4
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(two))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", trainer.__name__, "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD | {"ACCELERATE_USE_CPU": "true"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    trainer.run(load(cls, one, tmp_path))
    ours, theirs = losses(tmp_path / "one"), losses(tmp_path / "two")
    for step in range(8):
        for key in (k for k in ours[step] if not k.startswith(("batch/", "latent/", "loss/v_t"))):
            assert ours[step][key] == pytest.approx(theirs[step][key], rel=1e-3, abs=1e-4), (step, key)
    # As a whole: Adam turns rounding of the smallest gradients into whole steps.
    for path in sorted((tmp_path / "one/bundle").glob("*.safetensors")):
        assert distance(load_file(path), load_file(tmp_path / "two/bundle" / path.name)) < 1e-3, path.name
    # Adam's first moments are averages of the gradients, the discriminator's among them.
    for path in (tmp_path / "one/checkpoints/step_00000008").glob("optimizer_*.safetensors"):
        other = load_file(tmp_path / "two/checkpoints/step_00000008" / path.name)
        moments = {k: v for k, v in load_file(path).items() if k.endswith("/exp_avg")}
        assert moments and distance(moments, other) < 0.01, path.name
