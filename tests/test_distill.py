"""Distilled guidance: what the student is taught, that it learns it, goes on exactly, and needs one forward."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_runs import (
    ROOT,
    TINY,
    assert_same_curve,
    assert_same_weights,
    diffusion_settings,
    load,
    run_settings,
    stop_after,
)

from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.unet import UNet, UNetConfig
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import load_system
from training import distill, train_diffusion
from training.distill import DistillConfig, DistillTask
from training.plan import plan


def settings_of(teacher: Path, data: Path, output: Path, steps: int, **more: object) -> dict[str, Any]:
    return {
        "teacher": str(teacher),
        "captions": [str(data)],
        "held_out": str(data),
        "largest_scale": 5.0,
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
    settings = settings_of(tiny_bundle, data, folder / "run", 60, evaluate_every=60, ema_decay=0)
    return distill.run(load(DistillConfig, settings, folder))


def forwards(model: StableAudio, **asked: Any) -> list[int]:
    """Items in each forward of the network in a generation."""
    sizes: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    model.generate("a tone", seconds=0.5, seed=3, **asked)
    hook.remove()
    return sizes


def unet_of(config: UNetConfig, sizes: dict[str, int]) -> UNet:
    """A U-Net with random weights everywhere."""
    network = UNet(config, **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def text_transformer(folder: Path, like: Path) -> Path:
    """A transformer that reads text with the text encoder of `like`, with random weights."""
    config = load_system(ROOT / "configs/spectrogram_transformer/tiny.yaml")
    assert config.kind == "spectrogram_transformer"
    clap = load_system(like).clap
    assert clap is not None
    config = replace(config, clap=clap, transformer=replace(config.transformer, text=True))
    torch.manual_seed(0)
    network = config.network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    parts = {"transformer": network.state_dict(), "text_encoder": load_file(like / "text_encoder.safetensors")}
    parts["conditioner"] = Conditioner(config.timing, clap.text_width).state_dict()
    save_bundle(folder, config, parts, (like / "tokenizer.json").read_text())
    return folder


def test_the_teacher_is_guided_as_in_generation_each_item_by_its_own_scale(
    tiny_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "_UNPROMPTED", 0.0)
    monkeypatch.setattr(distill, "_AT_DEFAULT", 0.0)
    task = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1) | {"batch_size": 4}, tmp_path)
    batch, model = task.batch(0, 0, 1), StableAudio.from_pretrained(tiny_bundle, "cpu", "float32")
    assert batch["scale"].unique().numel() == 4 and 1 <= batch["scale"].min() and batch["scale"].max() <= 5
    x, sigma = 3 * batch["eps"], torch.full((4,), 3.0)
    with torch.no_grad():
        made = task.denoisers(batch)[0](x, sigma)
        for i in range(4):
            text = model.text_encoder.encode(batch["captions"][i : i + 1])
            condition = model.conditioner(text, batch["seconds_start"][i : i + 1], batch["seconds_total"][i : i + 1])
            alone = Guidance(model.network, model.process, condition, scale=float(batch["scale"][i]))
            torch.testing.assert_close(made[i : i + 1], alone(x[i : i + 1], sigma[:1]), rtol=1e-4, atol=1e-4)


def test_half_of_the_sounds_have_the_default_scale_and_few_no_prompt(
    tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    batch = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1) | {"batch_size": 400}, tmp_path).batch(0, 0, 1)
    dropped, scale = batch["dropped"], batch["scale"]
    assert 0.02 < dropped.float().mean() < 0.09 and bool((scale[dropped] == 1).all())
    default = StableAudio.from_pretrained(tiny_bundle, "cpu", "float32").config.generation.cfg
    assert 0.42 < (scale[~dropped] == default).float().mean() < 0.58
    others = scale[~dropped][scale[~dropped] != default].log() / math.log(5.0)
    assert 0 <= others.min() < 0.05 and 0.95 < others.max() <= 1 and abs(others.mean() - 0.5) < 0.1


def test_without_guidance_there_is_nothing_to_learn(
    tiny_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student begins as the teacher without guidance, whatever the scale."""

    def errors(unprompted: float) -> list[float]:
        monkeypatch.setattr(distill, "_UNPROMPTED", unprompted)
        task, losses = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1), tmp_path), []
        figures = task.step(task.batch(0, 0, 1), 0, lambda name, loss: losses.append(float(loss.detach())))
        assert set(figures) == {"loss/v", "loss/step1", "loss/step2", "loss/step3"} and len(losses) == 3
        return [float(figures[f"loss/step{i}"]) for i in (1, 2, 3)]

    assert max(errors(unprompted=1.0)) < 1e-8
    assert min(errors(unprompted=0.0)) > 1e-6


def test_what_comes_after_the_end_of_a_piece_is_not_learned(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    task = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1), tmp_path)
    batch = task.batch(0, 0, 1)
    batch["seconds_start"], batch["seconds_total"] = torch.zeros(2), torch.tensor([0.5, 9.0])
    counts = task.sounding(batch).sum((1, 2)).tolist()
    assert counts == [64 * 22, 64 * 64]  # 0.5 s are 21.5 frames
    seen: list[float] = []
    teacher, student = task.denoisers(batch)
    for frames in (22, 64):
        kept = torch.arange(64) < frames
        lesson = distill._Lesson(teacher, student, task.sounding(batch) & kept, lambda e: seen.append(e.item()))
        with torch.no_grad():
            lesson(2 * batch["eps"], torch.full((2,), 2.0))
    with torch.no_grad():
        x_t, t = 2 * batch["eps"] / 5**0.5, teacher.process.time(torch.full((2,), 2.0))
        wrong = (teacher.predict(x_t, t) - student.predict(x_t, t)).square()
    assert seen[0] == pytest.approx(float(wrong[..., :22].mean()), rel=1e-4)
    assert seen[1] == pytest.approx(float(torch.cat((wrong[0, :, :22], wrong[1]), 1).mean()), rel=1e-4)


def test_every_second_way_has_levels_between_those_of_the_steps(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    task = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1) | {"steps": 5}, tmp_path)
    ways = [task.batch(number, 0, 1)["sigmas"] for number in range(20)]
    own = ways[0]
    assert len(own) == 6 and own[-1] == 0 and all(torch.equal(way, own) for way in ways[::2])
    shares = [float((own[0] / way[0]).log() / (own[0] / own[1]).log()) for way in ways[1::2]]
    assert 0 < min(shares) < 0.3 and 0.7 < max(shares) < 1
    for way, share in zip(ways[1::2], shares, strict=True):
        between = [float(a ** (1 - share) * b**share) for a, b in pairwise(own[:-1])]
        assert way[:-2].tolist() == pytest.approx(between, rel=1e-4) and torch.equal(way[-2:], own[-2:])


def test_a_student_comes_near_its_teacher(student: Path, tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Nearer than where it began, which is the teacher without guidance, for noise that it has not seen."""
    task = task_of(settings_of(tiny_bundle, data, tmp_path / "run", 1), tmp_path)
    with torch.no_grad():
        before = task.evaluate(0)
    rows = [json.loads(line) for line in (student.parent / "losses.jsonl").read_text().splitlines()]
    (after,) = [row for row in rows if "held_out/distance" in row]
    assert after["held_out/distance"] < 0.8 * before["held_out/distance"]
    assert after["held_out/teacher_distance"] == pytest.approx(before["held_out/teacher_distance"], rel=1e-4)


def test_a_student_hears_the_scale(student: Path, tiny_bundle: Path) -> None:
    """At each of two scales it is nearer to the teacher's two forwards at that scale than at the other."""
    own, theirs = (StableAudio.from_pretrained(name, "cpu", "float32") for name in (student, tiny_bundle))
    text = theirs.text_encoder.encode(["warm slow piano"])
    condition = theirs.conditioner(text, torch.zeros(1), torch.full((1,), 1.4))
    x, sigma = 5 * torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0])

    def estimate(model: StableAudio, scale: float) -> torch.Tensor:
        with torch.no_grad():
            return Guidance(model.network, model.process, condition, scale=scale)(x, sigma)

    for scale, other in ((1.5, 4.5), (4.5, 1.5)):
        wanted = estimate(theirs, scale)
        assert (estimate(own, scale) - wanted).norm() < (estimate(own, other) - wanted).norm()


def test_a_student_needs_one_forward_a_step(student: Path, tiny_bundle: Path) -> None:
    model = StableAudio.from_pretrained(student, "cpu", "float32")
    assert model.config.generation == replace(load_system(tiny_bundle).generation, steps=3)
    assert forwards(model) == [1, 1, 1] == forwards(model, cfg=5.0) == forwards(model, cfg=1.0)
    assert forwards(model, steps=4, cfg=2.0) == [1] * 4


@pytest.mark.parametrize(
    ("asked", "count"),
    [({"rescale": 0.5}, 2), ({"cfg": 5.1}, 2), ({"cfg": 0.5}, 2), ({"negative": "noise"}, 3)],
)
def test_guidance_of_other_kinds_takes_more_forwards(asked: dict[str, Any], count: int, student: Path) -> None:
    model = StableAudio.from_pretrained(student, "cpu", "float32")
    assert forwards(model, **asked) == [count] * 3


@torch.no_grad()
def test_a_negative_prompt_of_a_student_leaves_each_frames_deviation(student: Path) -> None:
    model = StableAudio.from_pretrained(student, "cpu", "float32")
    text = model.text_encoder.encode(["warm slow piano", "drums"])
    both = model.conditioner(text, torch.zeros(2), torch.full((2,), 1.4))
    cond, negative = (Condition(both.tokens[i : i + 1], both.mask[i : i + 1]) for i in (0, 1))
    x, t = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.9])
    plain = Guidance(model.network, model.process, cond, scale=3.0).predict(x, t)
    moved = Guidance(model.network, model.process, cond, negative, scale=3.0).predict(x, t)
    torch.testing.assert_close(moved.std(1), plain.std(1))
    assert (moved - plain).norm() > 1e-3 * plain.norm()
    same = Guidance(model.network, model.process, cond, negative, scale=1.0).predict(x, t)
    torch.testing.assert_close(same, Guidance(model.network, model.process, cond, scale=1.0).predict(x, t))


def test_without_guidance_the_scale_is_not_heard() -> None:
    """At scale 1 the network is the one without the input, exactly."""
    sizes = {"channels": 4, "context_width": 8, "context_tokens": 3}
    shape = {"width": 16, "multipliers": (2, 2), "factors": (2,), "blocks": (1,), "attentions": (1, 1), "heads": 2}
    torch.manual_seed(0)
    with_input = unet_of(UNetConfig(**shape, groups=2, guidance=4.0), sizes)
    without = unet_of(UNetConfig(**shape, groups=2), sizes)
    state = with_input.state_dict()
    without.load_state_dict({k: v for k, v in state.items() if not k.startswith("guidance.")})
    x, t, condition = torch.randn(2, 4, 8), torch.rand(2), Condition.unmasked(torch.randn(3, 8), 2)
    plain = without(x, t, without.context(condition))
    assert torch.equal(plain, with_input(x, t, with_input.context(condition)))
    assert torch.equal(plain, with_input(x, t, with_input.context(condition, torch.ones(2))))
    assert not torch.allclose(plain, with_input(x, t, with_input.context(condition, torch.full((2,), 4.0))), atol=1e-3)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        without.context(condition, torch.ones(2))


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
    """Another teacher or largest scale is refused; other data, batches and steps are not."""
    settings = settings_of(tiny_bundle, data, tmp_path / "run", 1)
    distill.run(load(DistillConfig, settings, tmp_path))
    shutil.copytree(tiny_bundle, other := tmp_path / "other")
    state = load_file(other / "unet.safetensors")
    save_file({k: v * 1.01 if v.is_floating_point() else v for k, v in state.items()}, other / "unet.safetensors")
    settings["run"]["steps"] = 2
    for change, words in (
        ({"teacher": str(other)}, "teacher was weights [0-9a-f]{12}, is weights"),
        ({"largest_scale": 6.0}, "guidance"),
    ):
        with pytest.raises(UserError, match=words):
            distill.run(load(DistillConfig, settings | change, tmp_path))
    distill.run(load(DistillConfig, settings | {"steps": 4, "batch_size": 1, "held_out": None}, tmp_path))


def test_a_transformer_that_reads_text_is_distilled(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    teacher = text_transformer(tmp_path / "teacher", tiny_bundle)
    made = distill.run(load(DistillConfig, settings_of(teacher, data, tmp_path / "run", 2), tmp_path))
    assert set(forwards(StableAudio.from_pretrained(made, "cpu", "float32"))) == {1}
    assert set(forwards(StableAudio.from_pretrained(teacher, "cpu", "float32"), steps=3)) == {2}
    assert any(k.startswith("guidance.") for k in load_file(made / "transformer.safetensors"))


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


def test_mistakes_are_named(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "list").mkdir()
    good = settings_of(tiny_bundle, data, tmp_path / "run", 1)

    def listed(row: dict[str, Any]) -> dict[str, Any]:
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav"} | row))
        return {"captions": [str(folder)]}

    config = load_system(ROOT / "configs/complex_stft/tiny.yaml")
    save_bundle(mute := tmp_path / "mute", config, {"unet": config.network().state_dict()})
    shutil.copytree(tiny_bundle, rescaled := tmp_path / "rescaled")
    model = yaml.safe_load((rescaled / "config.yaml").read_text())
    model["generation"]["rescale"] = 0.4
    (rescaled / "config.yaml").write_text(yaml.safe_dump(model))
    for change, words in (
        (lambda: {"teacher": str(tmp_path / "none")}, "teacher: .*none is not there yet; run training.train_diffusion"),
        (lambda: {"teacher": str(mute)}, "teacher: .*mute reads no text, so it has no guidance to distil"),
        (lambda: {"teacher": str(rescaled)}, "rescales its guidance .generation.rescale 0.4.*set it to 0"),
        (lambda: listed({}), "a.wav: has no caption, and the teacher reads text"),
        (lambda: listed({"text": "x", "seconds": "long"}), "a.wav: its 'seconds' should be its length, got 'long'"),
        (lambda: listed({"text": "x", "seconds": -1}), "a.wav: its 'seconds' should be its length, got -1"),
        (lambda: {"steps": 1}, "batch_size must be at least 1 and steps 2"),
        (lambda: {"largest_scale": 1.0}, "largest_scale must lie above 1 and up to 100"),
        (lambda: {"largest_scale": 2.0}, "largest_scale: 2 is below the default of .*, 3"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            task_of(good | change(), tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_student_can_be_trained_further_and_distilled_again(
    student: Path, bundles: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Training on sound leaves its guidance input as it is; distilled again, it begins with it."""
    (folder := tmp_path / "student").mkdir()
    shutil.copytree(student, folder, dirs_exist_ok=True)
    for source, file in (("vae", "vae.safetensors"), ("clap", "text_encoder.safetensors")):
        shutil.copy(bundles[source] / file, folder)
    shutil.copy(bundles["clap"] / "tokenizer.json", folder)
    settings = diffusion_settings(bundles, tmp_path / "tuned", 2)
    settings |= {"initial": str(folder), "model": str(folder), "clap": str(folder)}
    tuned = train_diffusion.run(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    before, after = (load_file(path / "unet.safetensors") for path in (student, tuned))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed and not any(key.startswith("guidance.") for key in changed)
    plain = train_diffusion.DiffusionTask(  # with a model that has no such input, it goes on without
        load(train_diffusion.TrainDiffusionConfig, settings | {"model": str(TINY)}, tmp_path)
    )
    network = plain.modules["model"].network.state_dict()
    assert network.keys() == {k for k in before if not k.startswith("guidance.")}
    assert all(torch.equal(value, before[key]) for key, value in network.items() if not key.startswith("latent_"))
    task = task_of(settings_of(tuned, data, tmp_path / "again", 1), tmp_path)
    state = task.modules["model"].state_dict()
    assert torch.equal(state["network.guidance.to_out.weight"], before["guidance.to_out.weight"])
    assert all(p.requires_grad for p in task.modules["model"].parameters())


def test_a_distillation_can_be_planned(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings_of(tiny_bundle, data, tmp_path / "run", 1)))
    found = plan(tmp_path / "c.yaml", steps=1)
    assert found.trainer == "distill" and found.items == 6 and "teacher" in found.frozen and found.flops > 1e6
    assert not (tmp_path / "run").exists()
