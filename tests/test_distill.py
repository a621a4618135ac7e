"""Students of few steps: what they are taught, that they learn it, go on exactly, and say what they can't do."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_runs import (
    ROOT,
    assert_same_curve,
    assert_same_weights,
    diffusion_settings,
    load,
    run_settings,
    stop_after,
)

from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.diffusion.samplers import SAMPLERS
from stable_audio_lite.edits import Sound, Variation
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.restoration.restorer import Restorer
from stable_audio_lite.systems import GenerationDefaults, load_system
from training import distill, train_diffusion
from training.distill import DistillConfig, DistillTask, aim, arrive
from training.plan import plan


def settings_of(teacher: Path, data: Path, output: Path, steps: int, **more: object) -> dict[str, Any]:
    return {
        "teacher": str(teacher),
        "captions": [str(data)],
        "held_out": str(data),
        "steps": 3,
        "batch_size": 2,
        "optimizer": {"lr": 1e-3, "muon_lr": 0.01},
        "run": run_settings(output, steps, **{"evaluate_every": 10, **more}),
    }


def task_of(settings: dict[str, Any], folder: Path) -> DistillTask:
    config = load(DistillConfig, settings, folder)
    assert isinstance(config, DistillConfig)
    return DistillTask(config)


@pytest.fixture(scope="module")
def student(tiny_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    settings = settings_of(tiny_bundle, data, folder / "run", 12, evaluate_every=12, ema_decay=0)
    return distill.run(load(DistillConfig, settings, folder))


def unconditional(folder: Path) -> Path:
    """A bundle that reads no text, with random weights."""
    config = load_system(ROOT / "configs/complex_stft/tiny.yaml")
    torch.manual_seed(0)
    save_bundle(folder, config, {"unet": config.network().state_dict()})
    return folder


def test_the_target_is_where_the_guided_teacher_arrives_in_two_steps(
    tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    """By the formulas of DPM-Solver++(2M), with guidance as in generation, an item being as if it were alone."""
    changes = {"condition_dropout": 0.0, "batch_size": 6}
    task = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1) | changes, tmp_path)
    batch, model = task.batch(0, 0, 1), StableAudio.from_pretrained(tiny_bundle, "cpu", "float32")
    teacher, _ = task.denoisers(batch)
    shortest = int(batch["seconds_total"].argmin())
    one = slice(shortest, shortest + 1)
    text = model.text_encoder.encode(batch["captions"][one])
    timing = batch["seconds_start"][one], batch["seconds_total"][one]
    guided = Guidance(model.network, model.process, model.conditioner(text, *timing), scale=3.0)
    end = int((timing[1] * 44100 / 1024).ceil())
    assert end < 64, "the item should end within the window"

    def alone(x: torch.Tensor, sigma: float) -> torch.Tensor:
        estimate = guided(x, torch.tensor([sigma]))
        return torch.cat((estimate[..., :end], model.representation.silence[None, :, end:]), -1)

    for sigma, following in pairwise(task.sigmas.tolist()):
        x = batch["eps"] * sigma
        with torch.no_grad():
            reached = arrive(x, task.target(teacher, x, sigma, following), sigma, following)
            first = alone(x[one], sigma)
            if not following:
                torch.testing.assert_close(reached[one], first, rtol=1e-4, atol=1e-4)
                continue
            middle = (sigma * following) ** 0.5
            between = first + middle / sigma * (x[one] - first)
            second = 1.5 * alone(between, middle) - 0.5 * first
            expected = second + following / middle * (between - second)
        torch.testing.assert_close(reached[one], expected, rtol=1e-4, atol=1e-4)


def test_aiming_is_the_inverse_of_arriving() -> None:
    x, reached = torch.randn(2, 3, 5).double()
    torch.testing.assert_close(arrive(x, aim(x, reached, 4.0, 1.5), 4.0, 1.5), reached)
    steps = SAMPLERS["ddim"](lambda x, s: 0.3 * x, x, torch.tensor([4.0, 1.5]).double(), noise=lambda: x)
    torch.testing.assert_close(steps, arrive(x, 0.3 * x, 4.0, 1.5))


def test_without_guidance_a_teacher_of_as_many_steps_has_nothing_to_teach(
    tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    """The student begins as the teacher: all its errors are 0 then; guidance or more steps give it some."""
    settings = settings_of(tiny_bundle, data, tmp_path / "run", 1) | {"teacher_steps": 1, "cfg": 1.0}

    def errors(**changes: Any) -> list[float]:
        task, losses = task_of(settings | changes, tmp_path), []
        figures = task.step(task.batch(0, 0, 1), 0, lambda name, loss: losses.append(float(loss.detach())))
        assert set(figures) == {"loss/v", "loss/step1", "loss/step2", "loss/step3"} and len(losses) == 3
        return [float(figures[f"loss/step{i}"]) for i in (1, 2, 3)]

    assert max(errors()) < 1e-8
    assert min(errors(cfg=3.0)) > 1e-6
    assert errors(teacher_steps=2)[0] > 1e-6 and errors(teacher_steps=2)[2] < 1e-6


def test_a_student_comes_near_its_teacher(student: Path, tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Nearer than where it began, which is the teacher without guidance, for noise that it has not seen."""
    task = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1), tmp_path)
    with torch.no_grad():
        before = task.evaluate(0)
    rows = [json.loads(line) for line in (student.parent / "losses.jsonl").read_text().splitlines()]
    (after,) = [row for row in rows if "held_out/distance" in row]
    assert after["held_out/distance"] < 0.8 * before["held_out/distance"]
    assert after["held_out/teacher_distance"] == pytest.approx(before["held_out/teacher_distance"], rel=1e-4)


def test_a_student_needs_one_call_a_step(student: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StableAudio.from_pretrained(student, "cpu", "float32")
    assert model.config.generation == GenerationDefaults(
        **vars(load_system(tiny_bundle).generation) | {"steps": 3, "cfg": 1.0, "sampler": "ddim", "distilled": 3.0}
    )
    sizes: list[int] = []
    model.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    made = model.generate("a tone", seconds=0.5, seed=3)
    assert sizes == [1, 1, 1] and made.settings[0]["steps"] == 3
    sizes.clear()
    sound = Sound(made.audio[0], made.sample_rate)
    levels: list[float] = []
    model.network.register_forward_pre_hook(lambda module, inputs: levels.append(float(inputs[1][0])))
    model.generate("a tone", seed=3, edit=Variation(sound, strength=0.6))
    known = [float(model.process.time(torch.tensor([s]))) for s in (100.0, (100 * 0.03) ** 0.5, 0.03)]
    assert levels == pytest.approx(known[1:], abs=1e-6)


@pytest.mark.parametrize(
    "asked", [{"steps": 50}, {"cfg": 4.0}, {"negative": "noise"}, {"rescale": 0.5}, {"sampler": "dpmpp-2m"}]
)
def test_what_a_student_can_not_do_is_said(asked: dict[str, Any], student: Path) -> None:
    model = StableAudio.from_pretrained(student, "cpu")
    (name,) = asked
    words = (
        f"^{name}: this model is a student that samples in 3 steps, with guidance of scale 3 built in; leave {name} out"
    )
    with pytest.raises(UserError, match=words):
        model.generate("a tone", **asked)
    with pytest.raises(UserError, match=words):
        model.extend("a tone", seconds=1, **asked)


def test_what_a_student_asks_for_may_be_asked_for(student: Path) -> None:
    model = StableAudio.from_pretrained(student, "cpu")
    made = [model.generate("a tone", seconds=0.3, seed=1, **own).audio for own in ({}, {"steps": 3, "cfg": 1.0})]
    assert torch.equal(*made)


def test_an_interrupted_run_repeats_an_uninterrupted_one(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Losses, held-out figures and weights."""
    more = {"checkpoint_every": 3, "evaluate_every": 2}
    whole, broken = (
        load(DistillConfig, settings_of(tiny_bundle, data, tmp_path / name, 7, **more), tmp_path) for name in ("a", "b")
    )
    one = distill.run(whole)
    stop_after(broken, distill, 4)
    other = distill.run(broken)
    assert_same_curve(tmp_path / "a", tmp_path / "b", 0, 7)
    assert_same_weights(one, other)


def test_a_run_goes_on_with_its_teacher_alone(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Another teacher, guidance or number of steps is refused; other data, batches and teacher's steps are not."""
    settings = settings_of(tiny_bundle, data, tmp_path / "run", 1)
    distill.run(load(DistillConfig, settings, tmp_path))
    shutil.copytree(tiny_bundle, other := tmp_path / "other")
    state = load_file(other / "unet.safetensors")
    save_file({k: v * 1.01 if v.is_floating_point() else v for k, v in state.items()}, other / "unet.safetensors")
    settings["run"]["steps"] = 2
    for change, words in (
        ({"teacher": str(other)}, "teacher was weights [0-9a-f]{12}, is weights"),
        ({"cfg": 2.0}, "cfg was 3.0, is 2.0"),
        ({"steps": 2}, "steps was 3, is 2"),
    ):
        with pytest.raises(UserError, match=words):
            distill.run(load(DistillConfig, settings | change, tmp_path))
    distill.run(load(DistillConfig, settings | {"teacher_steps": 3, "batch_size": 1, "held_out": None}, tmp_path))


def test_a_model_without_text_is_distilled(tmp_path: Path) -> None:
    """From noise alone, and compared without captions."""
    teacher = unconditional(tmp_path / "teacher")
    settings = settings_of(teacher, tmp_path, tmp_path / "run", 2, evaluate_every=1) | {
        "captions": [],
        "held_out": None,
    }
    made = distill.run(load(DistillConfig, settings, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    assert any("held_out/distance" in row for row in rows)
    assert StableAudio.from_pretrained(made, "cpu").generate(seconds=0.1, seed=0).audio.abs().max() > 0
    with pytest.raises(UserError, match="is a student of few noise levels"):
        Restorer.from_pretrained(made, "cpu")
    with pytest.raises(UserError, match="reads no text; leave them out"):
        task_of(settings | {"cfg": 2.0}, tmp_path)


def test_pieces_are_asked_for_whole_or_in_windows(tiny_bundle: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "list").mkdir()
    rows = [
        {"file_name": f"{i}.wav", "text": f"tone {i}"} | s for i, s in enumerate(({"seconds": 0.5}, {}, {"seconds": 9}))
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = yaml.safe_load((tiny_bundle / "config.yaml").read_text())
    shutil.copytree(tiny_bundle, teacher := tmp_path / "teacher")
    model["generation"]["windows"] = [32]
    (teacher / "config.yaml").write_text(yaml.safe_dump(model))
    task = task_of(settings_of(teacher, folder, tmp_path / "run", 1) | {"batch_size": 1}, tmp_path)
    window, seen = task.representation.window_seconds, {}
    for number in range(12):
        batch = task.batch(number, 0, 1)
        start, total = float(batch["seconds_start"]), float(batch["seconds_total"])
        seen.setdefault(batch["captions"][0], []).append((batch["eps"].shape[-1], start, total))
    assert {tuple(v) for v in seen["tone 0"]} == {(32, 0.0, 0.5)}
    assert {f for f, _, _ in seen["tone 1"]} == {64} and seen["tone 1"][0][1:] == pytest.approx((0.0, window))
    starts = {start for _, start, _ in seen["tone 2"]}
    assert len(starts) == 4 and 0 <= min(starts) and max(starts) <= 9 - window


def test_mistakes_are_named(tiny_bundle: Path, student: Path, data: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "list").mkdir()
    good = settings_of(tiny_bundle, data, tmp_path / "run", 1)

    def listed(row: dict[str, Any]) -> dict[str, Any]:
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav"} | row))
        return {"captions": [str(folder)]}

    for change, words in (
        (lambda: {"teacher": str(tmp_path / "none")}, "teacher: .*none is not there yet; run training.train_diffusion"),
        (lambda: {"teacher": str(student)}, "is a student itself; give the model that it was distilled from"),
        (lambda: {"captions": []}, "captions: .* reads text; name data sets with captions"),
        (lambda: listed({}), "a.wav: has no caption, and the teacher reads text"),
        (lambda: listed({"text": "x", "seconds": "long"}), "a.wav: its 'seconds' should be its length, got 'long'"),
        (lambda: listed({"text": "x", "seconds": -1}), "a.wav: its 'seconds' should be its length, got -1"),
        (lambda: {"steps": 0}, "steps must be at least 1"),
        (lambda: {"cfg": -1.0}, "cfg must lie in 0..100"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            task_of(good | change(), tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_student_is_not_trained_further(student: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    (folder := tmp_path / "student").mkdir()
    shutil.copytree(student, folder, dirs_exist_ok=True)
    for source, file in (("vae", "vae.safetensors"), ("clap", "text_encoder.safetensors")):
        shutil.copy(bundles[source] / file, folder)
    settings = diffusion_settings(bundles, tmp_path / "run", 1) | {"initial": str(folder)}
    with pytest.raises(UserError, match="initial: .* is a student"):
        train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))


def test_guidance_and_a_student_do_not_go_together_in_a_config() -> None:
    with pytest.raises(ValueError, match="with distilled, cfg must be 1, rescale 0 and sampler ddim"):
        GenerationDefaults(distilled=4.0, cfg=4.0, sampler="ddim")


def test_a_distillation_can_be_planned(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings_of(tiny_bundle, data, tmp_path / "run", 1)))
    found = plan(tmp_path / "c.yaml", steps=1)
    assert found.trainer == "distill" and found.items == 6 and "teacher" in found.frozen and found.flops > 1e6
    assert not (tmp_path / "run").exists()
