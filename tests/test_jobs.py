"""The queue behind page and service: batches, cancellation, limits, and results that expire; and the models' store."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_audio_lite.edits import Loop, Sound, Variation
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import Plan, StableAudio
from stable_audio_lite.server.jobs import Bounds, Job, Jobs, NoJob, QueueFull, Stopping
from stable_audio_lite.server.models import ModelStore

SHORT: dict[str, Any] = {"seconds": 0.2, "steps": 2}


@pytest.fixture
def started(store: ModelStore) -> Iterator[Callable[..., Jobs]]:
    """Start queues with given bounds, which end with the test."""
    all_jobs: list[Jobs] = []

    def start(**bounds: Any) -> Jobs:
        all_jobs.append(Jobs(store, Bounds(**bounds)))
        return all_jobs[-1]

    yield start
    for jobs in all_jobs:
        jobs.close()


class Gate:
    """Holds the sampler of a store's model back; records the batches that pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.batches = threading.Event(), threading.Event(), []
        render = StableAudio.render

        def held(model: StableAudio, plan: Plan, batch: int, progress: Any) -> Any:
            self.batches.append([prompt for prompt, _ in plan.items])
            self.reached.set()
            assert self.opened.wait(60)
            return render(model, plan, batch, progress)

        monkeypatch.setattr(StableAudio, "render", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def ask(jobs: Jobs, prompt: str = "piano", **settings: Any) -> Job:
    choice = jobs.store.choose()
    return jobs.submit(choice, jobs.store.outline(choice).plan(prompt, **(SHORT | settings)))


def test_a_job_makes_what_the_model_makes(started: Callable[..., Jobs], store: ModelStore) -> None:
    job = ask(started(), "piano", seed=4, count=2)
    assert job.wait(60) and job.state == "done" and job.progress == 1
    model = store.load(store.choose())
    expected = model.generate("piano", seed=4, count=2, **SHORT)
    assert job.settings == expected.settings
    stored = sum(piece.untyped_storage().nbytes() for item in range(2) for piece in job.pieces(item))
    assert stored == expected.audio.nbytes  # and not what they were cut from
    for item in range(2):
        torch.testing.assert_close(job.audio(item), expected.audio[item], atol=1e-4, rtol=0)


def test_progress_counts_steps_and_decoding(started: Callable[..., Jobs], gate: Gate, monkeypatch) -> None:
    """It only grows, is below 1 while there is something to decode, and 1 at the end, also where no step is taken."""
    jobs, seen, render = started(), [], StableAudio.render
    time = torch.arange(22050) / 44100
    source = Sound((0.5 * (440 * time).sin()).expand(2, -1), 44100)

    def watched(model: StableAudio, plan: Plan, batch: int, progress: Any) -> Any:
        for piece in render(model, plan, batch, lambda *steps: (progress(*steps), seen.append(job.progress))):
            seen.append(job.progress)
            yield piece

    monkeypatch.setattr(StableAudio, "render", watched)
    for settings, events in (({"count": 2}, 4), ({"seconds": None, "edit": Variation(source, 0.0)}, 1)):
        gate.opened.clear()
        seen.clear()
        job = ask(jobs, **settings)
        gate.opened.set()
        assert job.wait(60) and job.state == "done" and job.progress == 1
        assert len(seen) == events and seen == sorted(seen) and seen[-1] < 1


def test_jobs_that_fit_together_are_one_batch_and_each_gets_its_own(started: Callable[..., Jobs], gate: Gate) -> None:
    """With its own prompts and seeds; others wait, and none overtakes one that it fits."""
    jobs = started(batch=3)
    first = ask(jobs, "first")
    assert gate.reached.wait(60)
    rest = [
        ask(jobs, "piano", seed=9),
        ask(jobs, "other", steps=3),
        ask(jobs, "drums", seed=1),
        ask(jobs, "two", count=2),
        ask(jobs, "quartet", seed=3),
    ]
    assert [jobs.position(job) for job in rest] == [0, 1, 2, 3, 4] and jobs.position(first) is None
    gate.opened.set()
    assert all(job.wait(60) and job.state == "done" for job in [first, *rest])
    assert gate.batches == [["first"], ["piano", "drums", "quartet"], ["other"], ["two", "two"]]
    model = jobs.store.load(jobs.store.choose())
    for job, prompt, seed in ((rest[0], "piano", 9), (rest[2], "drums", 1), (rest[4], "quartet", 3)):
        torch.testing.assert_close(job.audio(0), model.generate(prompt, seed=seed, **SHORT).audio[0], atol=1e-4, rtol=0)
    assert (jobs.totals.batches, jobs.totals.items) == (4, 7)


def test_plans_fit_where_request_and_edit_are_the_same(store: ModelStore) -> None:
    plan = store.outline(store.choose()).plan
    time = torch.arange(44100) / 44100
    sounds = [Sound((440 * time).sin().expand(2, -1), 44100) for _ in range(2)]
    plans = [
        plan("a", seed=1, **SHORT),
        plan("b", seed=2, count=3, **SHORT),
        plan("a", seed=1, cfg=2.0, **SHORT),
        plan("a", negative="b", **SHORT),
        plan("a", edit=Loop(), **SHORT),
        plan("b", edit=Loop(), **SHORT),
        plan("a", edit=Variation(sounds[0]), **SHORT),
        plan("b", edit=Variation(sounds[0]), **SHORT),
        plan("a", edit=Variation(sounds[1]), **SHORT),
    ]
    alike = {(i, j) for i in range(9) for j in range(i) if plans[i].fits(plans[j])}
    assert alike == {(1, 0), (5, 4), (7, 6)}
    after = store.outline(store.choose()).plan_extension("a", seconds=0.2, steps=2, after=sounds[0])
    assert not after.fits(after)


def test_what_waits_and_what_runs_can_be_cancelled(started: Callable[..., Jobs], gate: Gate) -> None:
    jobs = started(batch=1)
    running, waiting, last = (ask(jobs, steps=steps) for steps in (50, 50, 2))
    assert gate.reached.wait(60)
    for job in (running, waiting):
        assert jobs.cancel(job.id).state == "cancelled" and job.wait(0)
    gate.opened.set()
    assert last.wait(60) and last.state == "done"
    assert running.state == waiting.state == "cancelled" and running.progress < 1
    assert jobs.cancel(last.id).state == "done"  # it had ended
    assert len(gate.batches) == 2


def test_one_of_a_batch_cancelled_leaves_the_others(started: Callable[..., Jobs], gate: Gate) -> None:
    jobs = started()
    ask(jobs, "first")
    assert gate.reached.wait(60)
    kept, left = ask(jobs, seed=1), ask(jobs, seed=2)
    gate.opened.set()
    jobs.cancel(left.id)
    assert kept.wait(60) and kept.state == "done" and left.state == "cancelled" and not left.pieces(0)


def test_a_full_queue_refuses_and_says_when_to_come_back(started: Callable[..., Jobs], gate: Gate) -> None:
    jobs = started(waiting=2)
    first = ask(jobs)
    assert gate.reached.wait(60)
    ask(jobs), ask(jobs)
    with pytest.raises(QueueFull, match=r"2 jobs wait; try again in \d+ s") as refused:
        ask(jobs)
    assert refused.value.retry_after >= 1 and jobs.totals.refused == 1
    gate.opened.set()
    assert first.wait(60)


def test_what_takes_too_long_fails_and_says_so(started: Callable[..., Jobs]) -> None:
    job = ask(started(work_seconds=0))
    assert job.wait(60) and job.state == "failed" and "took longer than 0 s" in job.error


def test_a_bug_fails_its_job_and_nothing_else(started: Callable[..., Jobs], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, render = started(), StableAudio.render
    for fault, line in (
        (KeyError("x"), "an error inside"),
        (UserError("mend it"), "mend it"),
        (MemoryError(), "memory"),
    ):
        monkeypatch.setattr(StableAudio, "render", lambda *_, fault=fault: (_ for _ in ()).throw(fault))
        job = ask(jobs)
        assert job.wait(60) and job.state == "failed" and line in job.error
    monkeypatch.setattr(StableAudio, "render", lambda *_: iter([(0, torch.full((2, 9), torch.nan))]))
    job = ask(jobs)
    assert job.wait(60) and "NaN" in job.error
    monkeypatch.setattr(StableAudio, "render", render)
    job = ask(jobs)
    assert job.wait(60) and job.state == "done"


def test_results_expire_by_age_and_by_size_and_say_so(started: Callable[..., Jobs]) -> None:
    sound = 2 * 8820 * 4 + 4096
    jobs = started(keep_bytes=2 * sound)
    made = [ask(jobs, seed=seed) for seed in range(3)]
    assert all(job.wait(60) for job in made)
    with pytest.raises(NoJob, match="has expired; send the request again") as gone:
        jobs.get(made[0].id)
    assert gone.value.gone and jobs.get(made[2].id) is made[2] and jobs.kept_bytes == 2 * sound
    short = started(keep_seconds=0)
    job = ask(short)
    assert job.wait(60)
    with pytest.raises(NoJob, match="has expired"):
        short.get(job.id)
    assert short.kept_bytes == 0


def test_a_job_of_another_process_is_told_from_one_that_never_was(started: Callable[..., Jobs]) -> None:
    before, after = started(), started()
    with pytest.raises(NoJob, match="started again since") as gone:
        after.get(ask(before).id)
    assert gone.value.gone
    for never in ("", "../../etc/passwd", "x" * 10000, ask(after).id.replace("-0-", "-7-")):
        with pytest.raises(NoJob, match="there is no job") as none:
            after.get(never)
        assert not none.value.gone and len(str(none.value)) < 200


def test_a_stop_hands_back_what_waits_and_finishes_what_runs(started: Callable[..., Jobs], gate: Gate) -> None:
    jobs = started(batch=1)
    running, waiting = ask(jobs), ask(jobs)
    assert gate.reached.wait(60)
    jobs.stop()
    assert waiting.state == "failed" and "did not begin this; send the request again" in waiting.error
    with pytest.raises(Stopping):
        ask(jobs)
    gate.opened.set()
    assert running.wait(60) and running.state == "done"
    assert not jobs.idle
    running.collected = waiting.collected = True
    jobs.close()
    assert jobs.idle


def test_closing_hands_back_what_runs(started: Callable[..., Jobs], gate: Gate) -> None:
    jobs = started()
    job = ask(jobs, steps=50)
    assert gate.reached.wait(60)
    closing = threading.Thread(target=jobs.close)
    closing.start()
    assert job.wait(60) and job.state == "failed" and "stopped before this was complete" in job.error
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()


def test_a_sound_that_goes_on_begins_with_what_it_goes_on_from(started: Callable[..., Jobs]) -> None:
    jobs, time = started(), torch.arange(22050) / 44100
    source = Sound((0.5 * (440 * time).sin()).expand(2, -1), 44100)
    plan = jobs.store.outline(jobs.store.choose()).plan_extension("piano", seconds=2.0, after=source, steps=2, seed=1)
    job = jobs.submit(jobs.store.choose(), plan)
    assert job.wait(60) and job.state == "done"
    assert job.audio(0).shape == (2, 22050 + 88200) and len(job.pieces(0)) > 2
    assert torch.equal(job.audio(0)[:, :22050], source.audio)
    assert float(job.audio(0).abs().max()) <= 1


def test_a_plan_without_weights_is_that_of_the_model(store: ModelStore) -> None:
    """Also in what is refused."""
    outline, model = store.outline(store.choose()), store.load(store.choose())
    settings = {"seconds": 1.0, "seed": 3, "negative": "drums"}
    assert outline.plan(["a", "b"], **settings) == model.plan(["a", "b"], **settings)
    assert (outline.hash, outline.window_seconds) == (model.hash, model.window_seconds)
    for wrong in ({"seconds": 99.0}, {"steps": 0}, {"cfg": 1.0, "negative": "x"}):
        lines = []
        for either in (outline, model):
            with pytest.raises(UserError) as refused:
                either.plan("a", **wrong)
            lines.append(str(refused.value))
        assert lines[0] == lines[1]


def test_a_second_model_unloads_the_first_only_where_memory_is_short(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableAudio, "from_pretrained", lambda *_, **__: object())
    free = 1 << 40
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    store = ModelStore([tiny_bundle, other], device="cpu", free_memory=lambda device: free)
    one, two = store.choose(), store.choose(str(other))
    first = store.load(one)
    store.load(two)
    assert store.load(one) is first and store.loaded == (two, one)
    free = 1 << 20
    assert store.load(one) is first  # it is there already
    del store._loaded[two]
    store.load(two)
    assert store.loaded == (two,)


def test_only_models_that_were_named_can_be_chosen(tiny_bundle: Path, store: ModelStore, tmp_path: Path) -> None:
    for wrong in ("starter", str(tiny_bundle.parent), "../tiny", ""):
        with pytest.raises(UserError, match="model: there is no"):
            store.choose(wrong)
    for lora, strength, message in ((str(tmp_path), None, "lora: there is no"), (None, 1.0, "lora_strength")):
        with pytest.raises(UserError, match=message):
            store.choose(None, lora, strength)
    with pytest.raises(UserError, match="no such folder"):
        ModelStore([tiny_bundle], [tmp_path / "none"], device="cpu")
    with pytest.raises(UserError, match="has no unet"):
        ModelStore(["starter-vae"], device="cpu")
