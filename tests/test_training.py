"""The loop: a killed run goes on exactly, losses fall, NaN stops with a named step, checkpoints are whole."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.config import load_config
from stable_audio_lite.data.latents import encoder_hash, read_latents
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.vae import Posterior
from training import pre_encode, regenerate, train_clap, train_diffusion, train_vae
from training.checkpoint import Resumable, checkpoints, load_checkpoint, save_checkpoint
from training.losses import feature_matching, hinge_discriminator, hinge_generator

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs/stable_audio/tiny.yaml"
TOLERANCE = 1e-6
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned tones of 1 to 2.5 s."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(6):
        seconds = 1 + 0.3 * index
        time_axis = np.arange(round(seconds * 44100)) / 44100
        tone = 0.3 * np.sin(2 * np.pi * 110 * (index + 1) * time_axis)
        audio = np.stack((tone, 0.5 * tone)) + 0.01 * rng.standard_normal((2, len(tone)))
        write_audio(folder / f"{index}.wav", audio, 44100)
        captions = [f"a tone number {index}", f"tone, {110 * (index + 1)} hertz"]
        rows.append({"file_name": f"{index}.wav", "text": captions[0], "captions": captions, "seconds": seconds})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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
        "weights": {"waveform": 1.0},
        "discriminator": {"windows": [256], "filters": 4},
        "discriminator_optimizer": {"lr": 1e-3},
        "discriminator_start": 3,
        "run": run_settings(output, steps, **more),
    }


def load(cls: type, settings: dict[str, object], folder: Path) -> object:
    path = folder / f"{cls.__name__}-{random.getrandbits(32)}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path, cls)


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


@pytest.fixture(scope="module")
def bundles(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny VAE, CLAP and latent cache from one short run of each trainer."""
    folder = tmp_path_factory.mktemp("bundles")
    vae = train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, folder / "vae", 2), folder))
    clap = train_clap.run(load(train_clap.TrainClapConfig, clap_settings(data, folder / "clap", 2), folder))
    latents = pre_encode.run(pre_encode.PreEncodeConfig(vae=str(vae), data=str(data), output=str(folder / "latents")))
    return {"vae": vae, "clap": clap, "latents": latents}


def clap_settings(data: Path, output: Path, steps: int, **more: object) -> dict[str, object]:
    return {
        "model": str(TINY),
        "data": str(data),
        "batch_size": 3,
        "optimizer": {"lr": 1e-3},
        "run": run_settings(output, steps, **more),
    }


def diffusion_settings(bundles: dict[str, Path], output: Path, steps: int, **more: object) -> dict[str, object]:
    return {
        "model": str(TINY),
        **{k: str(v) for k, v in bundles.items()},
        "held_out": str(bundles["latents"]),
        "batch_size": 4,
        "optimizer": {"lr": 1e-3, "warmup_steps": 5},
        "run": run_settings(output, steps, evaluate_every=10, **more),
    }


Settings = Callable[..., dict[str, object]]


def trainer_of(name: str, data: Path, bundles: dict[str, Path]) -> tuple[object, type, Settings]:
    """A trainer's module, its config's class and (output, steps, ...) -> settings."""
    return {
        "vae": (train_vae, train_vae.TrainVAEConfig, partial(vae_settings, data)),
        "clap": (train_clap, train_clap.TrainClapConfig, partial(clap_settings, data)),
        "diffusion": (train_diffusion, train_diffusion.TrainDiffusionConfig, partial(diffusion_settings, bundles)),
    }[name]


@pytest.mark.parametrize("name", ["vae", "clap", "diffusion"])
def test_resumed_equals_uninterrupted(name: str, data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Stopped at step 10 and started again, the next 20 steps' losses and the final weights are the same."""
    trainer, cls, settings = trainer_of(name, data, bundles)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.run(load(cls, settings(whole, 30), tmp_path))
    stop_after(load(cls, settings(parts, 30), tmp_path), trainer, step=13)
    assert [p.name for p in checkpoints(parts / "checkpoints")] == ["step_00000010"]
    trainer.run(load(cls, settings(parts, 30), tmp_path))
    assert_same_curve(whole, parts, 10, 30)
    assert_same_weights(whole / "bundle", parts / "bundle")


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
    deadline = time.monotonic() + 120
    while not begun() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.random() * within)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


@pytest.mark.parametrize(("name", "kills", "steps"), [("vae", 10, 150), ("clap", 1, 60), ("diffusion", 1, 60)])
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.run(load(cls, settings(whole, steps), tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert_same_curve(whole, killed, 0, steps)
    assert_same_weights(whole / "bundle", killed / "bundle")


def test_killed_pre_encoding_goes_on(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL at a random moment leaves whole latents only; the same command ends with the cache of one whole run."""
    many, cache = tmp_path / "many", tmp_path / "latents"
    many.mkdir()
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for copy in range(10):  # long enough to be killed in the middle
        for row in rows:
            (many / f"{copy}-{row['file_name']}").symlink_to(data / row["file_name"])
    copies = [row | {"file_name": f"{copy}-{row['file_name']}"} for copy in range(10) for row in rows]
    (many / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in copies))
    config = tmp_path / "pre_encode.yaml"
    config.write_text(yaml.safe_dump({"vae": str(bundles["vae"]), "data": str(many), "output": str(cache)}))
    command = [sys.executable, "-m", "training.pre_encode", "--config", str(config)]
    kill(command, lambda: any(cache.glob("*.safetensors")), within=0.1)
    before = {p: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    assert 0 < len(before) < 60 and not (cache / "latents.json").exists()
    subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    assert all(p.stat().st_mtime_ns == changed for p, changed in before.items())  # those were whole: not encoded again
    config.write_text(yaml.safe_dump({"vae": str(bundles["vae"]), "data": str(many), "output": str(many / "whole")}))
    subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    assert len(list((many / "whole").glob("*.safetensors"))) == 60
    assert_same_weights(many / "whole", cache)
    assert len(json.loads((cache / "latents.json").read_text())["mean"]) == 64


def test_vae_learns(data: Path, tmp_path: Path) -> None:
    """Muon and the waveform term bring the loss down at once, as they must on six tones."""
    settings = vae_settings(data, tmp_path / "run", 40) | {"weights": {"waveform": 1.0, "mel": 1.0}}
    for key in ("discriminator", "discriminator_optimizer"):
        settings.pop(key)
    train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    curve = losses(tmp_path / "run")
    first = np.mean([curve[s]["loss/total"] for s in range(5)])
    last = np.mean([curve[s]["loss/total"] for s in range(35, 40)])
    assert last < 0.9 * first


def test_one_look_of_the_discriminator_gives_both_gradients(data: Path, tmp_path: Path) -> None:
    """Every parameter's gradient is that of the losses written down as in the papers, each network asked anew."""
    settings = vae_settings(data, tmp_path / "run", 1) | {"discriminator_start": 0}
    task = train_vae.VAETask(load(train_vae.TrainVAEConfig, settings, tmp_path))
    vae, judge = task.modules["vae"], task.modules["discriminator"]
    batch, weights = task.batch(0, 0, 1), task.config.weights
    audio = batch["audio"]
    output, mean, std = vae(audio, batch["noise"])
    stft = task.stft(output, audio)
    fake, real = judge(output), judge(audio)
    loss = sum(getattr(weights, name) * value for name, value in stft.items())
    loss = loss + weights.waveform * task.waveform(output, audio) + weights.kl * Posterior(mean, std).kl()
    loss = loss + weights.adversarial * hinge_generator(fake) + weights.features * feature_matching(real, fake)
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


def test_balanced_run_resumes(data: Path, tmp_path: Path) -> None:
    """The balancer's averages are part of a checkpoint: the same curve and weights after an interruption."""
    more = {"balance": 0.1}
    for name in ("whole", "parts"):
        config = load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / name, 20) | more, tmp_path)
        if name == "parts":
            stop_after(config, train_vae, step=13)
        train_vae.run(config)
    assert_same_curve(tmp_path / "whole", tmp_path / "parts", 10, 20)
    assert_same_weights(tmp_path / "whole/bundle", tmp_path / "parts/bundle")


def test_second_phase_keeps_the_latents(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    settings = vae_settings(data, tmp_path / "second", 5) | {"initial": str(bundles["vae"]), "freeze_encoder": True}
    second = train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    before, after = (load_file(b / "vae.safetensors") for b in (bundles["vae"], second))
    for key in before:
        same = torch.equal(before[key], after[key])
        assert same == key.startswith("encoder."), key


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


def vae_task_with_nans(config: object, bad: Callable[[int], bool]) -> train_vae.VAETask:
    """The task of `config`, whose total loss is NaN in its calls number 0, 1, ... for which `bad` is true."""
    task = train_vae.VAETask(config)
    total, calls = task._total, itertools.count()
    task._total = lambda *args: total(*args) * (float("nan") if bad(next(calls)) else 1.0)
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
    rates = []
    step = task.step

    def watched(batch: object, number: int, update: object) -> dict[str, torch.Tensor]:
        result = step(batch, number, update)
        rates.append(update.optimizers["vae"].param_groups[1]["lr"])
        return result

    task.step = watched
    train_vae.fit(longer.run, task, longer)
    assert rates == pytest.approx([0.5 * longer.optimizer.lr])


def test_endless_nan_ends_with_the_checkpoint_named(data: Path, tmp_path: Path) -> None:
    settings = vae_settings(data, tmp_path / "run", 30, max_returns=1)
    config = load(train_vae.TrainVAEConfig, settings, tmp_path)
    task = vae_task_with_nans(config, lambda call: call >= 12)
    with pytest.raises(UserError, match=r"not finite in the 5 steps up to \d+; last good checkpoint: .*step_00000010"):
        train_vae.fit(config.run, task, config)


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


def test_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    save_checkpoint(tmp_path, 1, Resumable({"net": small}, {}, {}), {})
    with pytest.raises(UserError, match="step_00000001"):
        load_checkpoint(tmp_path / "step_00000001", Resumable({"net": large}, {}, {}))


def test_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / ".step_00000006-x").mkdir()
    assert checkpoints(tmp_path) == []


def test_stratified_times_cover_every_part() -> None:
    times = train_diffusion.stratified_times(8, torch.Generator().manual_seed(0))
    assert sorted((times * 8).long().tolist()) == list(range(8))
    late = train_diffusion.stratified_times(8, torch.Generator().manual_seed(0), lowest=0.2)
    assert sorted(((late - 0.2) * 10).long().tolist()) == list(range(8))


def test_evaluation_hears_the_times_trained_on(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Above the lowest time, at every level there, the same on every call."""
    settings = diffusion_settings(bundles, tmp_path / "run", 1) | {"lowest_time": 0.5}
    task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    with torch.no_grad():
        figures = task.evaluate(0)
        assert figures == task.evaluate(9)
    assert set(figures) == {"held_out/v", "held_out/v_t2of4", "held_out/v_t3of4"}
    assert figures["held_out/v"] == pytest.approx((figures["held_out/v_t2of4"] + figures["held_out/v_t3of4"]) / 2)


def test_levels_without_items_are_logged_as_nan() -> None:
    """Every process names every level, or those that log together wait for each other."""
    figures = train_diffusion.loss_by_level(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.3, 0.4, 1.0]))
    assert [float(v) for v in figures.values()] == pytest.approx([math.nan, 2.0, math.nan, 5.0], nan_ok=True)


def test_some_conditions_are_dropped(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """As many as the share says, other ones in every step."""
    settings = diffusion_settings(bundles, tmp_path / "run", 1) | {"condition_dropout": 0.25, "batch_size": 20}
    task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    dropped = torch.stack([task.batch(step, 0, 1)["dropped"] for step in range(20)])
    assert 0.15 < float(dropped.float().mean()) < 0.35
    assert not torch.equal(dropped[0], dropped[1])


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


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors of `one` to those of the same name, relative to their norm."""
    size = torch.cat([v.flatten().float() for v in one.values()]).norm()
    return float(torch.cat([(v - other[k]).flatten().float() for k, v in one.items()]).norm() / size)


def test_smoothing_is_part_of_the_latent_space(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """The same weights with slow channels make other latents, so the cache is another."""
    state = load_file(bundles["vae"] / "vae.safetensors")
    assert len({encoder_hash(state, slow) for slow in (0, 8, 16)}) == 3
    decoder = {k: v + 1 if k.startswith("decoder.") else v for k, v in state.items()}
    assert encoder_hash(decoder, 8) == encoder_hash(state, 8)


def test_latents_of_another_vae_are_refused(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    other = train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "other", 3), tmp_path))
    settings = diffusion_settings(bundles | {"vae": other}, tmp_path / "run", 1)
    with pytest.raises(UserError, match="another VAE"):
        train_diffusion.run(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    config = pre_encode.PreEncodeConfig(vae=str(other), data=str(data), output=str(bundles["latents"]))
    with pytest.raises(UserError, match="another VAE"):
        pre_encode.run(config)


def test_training_goes_on_from_a_bundle(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """It starts with the bundle's U-Net and statistics; another VAE's or text encoder's bundle is refused."""
    cls = train_diffusion.TrainDiffusionConfig
    first = train_diffusion.run(load(cls, diffusion_settings(bundles, tmp_path / "first", 3), tmp_path))
    again = diffusion_settings(bundles, tmp_path / "again", 3) | {"initial": str(first)}
    task = train_diffusion.DiffusionTask(load(cls, again, tmp_path))
    trained = load_file(first / "unet.safetensors")
    for key, value in task.modules["model"].unet.state_dict().items():
        assert torch.equal(value, trained[key]), key
    assert torch.equal(task.windows.mean, trained["latent_mean"])
    other = tmp_path / "other"
    for part, words in (("vae", "another VAE"), ("text_encoder", "another text encoder")):
        shutil.copytree(first, other, dirs_exist_ok=True)
        state = load_file(first / f"{part}.safetensors")
        save_file({k: v + 0.1 for k, v in state.items()}, other / f"{part}.safetensors")
        with pytest.raises(UserError, match=words):
            train_diffusion.DiffusionTask(load(cls, again | {"initial": str(other)}, tmp_path))


def test_decoder_learns_on_regenerated_latents(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Little noise gives back nearly the cached latents, much does not; the decoder's crops lie where audio's do."""
    settings = diffusion_settings(bundles, tmp_path / "unet", 2)
    bundle = train_diffusion.run(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    encoder = encoder_hash(load_file(bundle / "vae.safetensors"), 0)
    cached, errors = read_latents(bundles["latents"], encoder), []
    for name, level in (("little", 0.05), ("much", 20.0)):
        made = regenerate.run(
            regenerate.RegenerateConfig(
                bundle=str(bundle),
                latents=str(bundles["latents"]),
                output=str(tmp_path / name),
                lowest=level,
                highest=level,
                steps=2,
                batch_size=4,
            )
        )
        again = read_latents(made, encoder)
        assert len(again) == len(cached) and len({z.shape for z in again}) == 1  # whole windows
        pairs = [(z[:, : y.shape[1]].float(), y[:, : z.shape[1]].float()) for z, y in zip(again, cached, strict=True)]
        errors.append(float(sum((a - b).square().mean() / b.var() for a, b in pairs) / len(pairs)))
    assert errors[0] < 0.05 < 0.5 < errors[1]

    frozen = {"initial": str(bundle), "freeze_encoder": True, "latents": str(tmp_path / "little")}
    settings = vae_settings(data, tmp_path / "decoder", 2) | frozen
    task = train_vae.VAETask(load(train_vae.TrainVAEConfig, settings, tmp_path))
    batch = task.batch(0, 0, 1)
    with torch.no_grad():
        inner = task.modules["vae"].encode(batch["audio"]).mean[:, :, 2:-2]
    assert float((inner - batch["latents"][:, :, 2:-2]).square().mean()) < 0.1 * float(inner.var())
    decoder = train_vae.run(load(train_vae.TrainVAEConfig, settings, tmp_path))
    before, after = load_file(bundle / "vae.safetensors"), load_file(decoder / "vae.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("encoder."))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("decoder."))


def test_items_without_caption_are_named(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(data / "0.wav", tmp_path)
    config = pre_encode.PreEncodeConfig(vae=str(bundles["vae"]), data=str(tmp_path), output=str(tmp_path / "latents"))
    with pytest.raises(UserError, match="0.wav: has no caption"):
        pre_encode.run(config)
    assert not (tmp_path / "latents").exists()


def test_latents_of_other_items_are_refused(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Decoding cached latents needs a finished encoder, and as many items as the data has."""
    wrong = vae_settings(data, tmp_path / "a", 1) | {"latents": str(bundles["latents"])}
    with pytest.raises(UserError, match="latents needs freeze_encoder"):
        load(train_vae.TrainVAEConfig, wrong, tmp_path)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    shutil.copy(data / "0.wav", fewer)
    settings = vae_settings(fewer, tmp_path / "b", 1) | {
        "initial": str(bundles["vae"]),
        "freeze_encoder": True,
        "latents": str(bundles["latents"]),
    }
    with pytest.raises(UserError, match="6 items, the data has 1"):
        train_vae.VAETask(load(train_vae.TrainVAEConfig, settings, tmp_path))


def test_interrupted_pre_encoding_goes_on(
    data: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three items, the same command encodes the others only, and the cache is that of one whole run."""
    config = pre_encode.PreEncodeConfig(vae=str(bundles["vae"]), data=str(data), output=str(tmp_path / "latents"))
    encode, encoded = pre_encode.encode_item, []

    def counting(vae: object, item: object, sample_rate: int) -> torch.Tensor:
        if len(encoded) == 3:
            raise InterruptedError
        encoded.append(item)
        return encode(vae, item, sample_rate)

    monkeypatch.setattr(pre_encode, "encode_item", counting)
    with pytest.raises(InterruptedError):
        pre_encode.run(config)
    assert not (tmp_path / "latents/latents.json").exists()
    encoded.clear()
    pre_encode.run(config)
    assert len(encoded) == 3  # of six
    assert_same_weights(bundles["latents"], tmp_path / "latents")
    whole, parts = (json.loads((f / "latents.json").read_text()) for f in (bundles["latents"], tmp_path / "latents"))
    assert whole == parts
