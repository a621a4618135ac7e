"""A bounded queue of jobs and the one thread that makes their sounds, those that fit together in one batch.

    jobs = Jobs(ModelStore())
    job = jobs.submit(choice, store.outline(choice).plan("solo piano", seconds=8))
    while not job.wait(0.2):
        print(job.progress)
    job.audio(0)  # (C, T), if job.state is "done"

Everything is in memory and ends with the process: an id tells which process it is of.
"""

from __future__ import annotations

import collections
import logging
import math
import re
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stable_audio_lite.audio.levels import Leveller
from stable_audio_lite.command import explained
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import Plan, StableAudio
from stable_audio_lite.server.models import ModelChoice, ModelStore

State = Literal["queued", "running", "done", "failed", "cancelled"]

MOST_CHARACTERS = 2000
"""Length of the longest prompt, also of one that comes inside a sound."""

_log = logging.getLogger(__name__)
_SWEEP_SECONDS = 5.0  # between two looks for expired results while there is nothing to do
_DECODING = 12  # sampling steps that decoding takes as long as, about, by the starter
_RECORD = 4096  # bytes that a job without sound counts for


class QueueFull(UserError):
    """As many jobs wait as may; `retry_after` are the seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"the queue is full, {waiting} jobs wait; try again in {retry_after} s")
        self.retry_after = retry_after


class NoJob(UserError):
    """There is no job of that id; `gone` where there was one."""

    def __init__(self, message: str, gone: bool):
        super().__init__(message)
        self.gone = gone


class Stopping(UserError):
    """No job is taken any more."""


class _Stop(Exception):
    """Ends sampling between two steps."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a queue.

    Attributes:
        waiting: jobs that may wait.
        batch: sounds sampled at once.
        work_seconds: time that a batch may take.
        keep_seconds: time that results are kept.
        keep_bytes: memory that results may take; beyond, the oldest expire.
    """

    waiting: int = 64
    batch: int = 8
    work_seconds: float = 600
    keep_seconds: float = 600
    keep_bytes: int = 512 << 20


@dataclass
class Totals:
    """Counts since the start: jobs by their final state, and what the worker did.

    Attributes:
        finished: jobs by state.
        refused: jobs that found the queue full.
        batches, items: sampled, and sounds in them.
        waited, worked: seconds that jobs waited, and that the worker was busy.
        sound: seconds of sound made.
    """

    finished: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: int = 0
    batches: int = 0
    items: int = 0
    waited: float = 0.0
    worked: float = 0.0
    sound: float = 0.0


class Job:
    """A plan on its way to sounds; `Jobs` alone changes it.

    Attributes:
        id: of the job, which can't be guessed.
        choice: of the model.
        state: queued, running, then done, failed or cancelled.
        progress: share of the work that is done, by steps and by what is decoded; 1 where it is done.
        error: one line that says why it failed.
        notes: what of the prompts the model doesn't read or know.
        settings: per item, everything needed to make it again; empty until it runs.
        sample_rate: Hz.
        created, started, finished: seconds of `time.monotonic`.
        collected: whether its client has seen how it ended.
    """

    def __init__(self, identity: str, choice: ModelChoice, plan: Plan, outline: StableAudio):
        self.id, self.choice, self.sample_rate = identity, choice, outline.sample_rate
        self.state: State = "queued"
        self.progress, self.error, self.collected = 0.0, "", False
        self.notes: list[str] = []
        self.settings: list[dict[str, Any]] = []
        self.created, self.started, self.finished = time.monotonic(), 0.0, 0.0
        self.plan: Plan | None = plan
        self._pieces: list[list[Tensor]] = [[] for _ in plan.items]
        self._leveller = Leveller(self.sample_rate) if plan.after is not None else None
        if plan.after is not None:
            self._pieces[0].append(plan.after.fitted(outline.representation))
        self._ended = threading.Event()

    @property
    def items(self) -> int:
        """Number of sounds."""
        return len(self._pieces)

    @property
    def ended(self) -> bool:
        """True once it is done, failed or cancelled."""
        return self._ended.is_set()

    @property
    def left_seconds(self) -> float | None:
        """Time that the work still takes, by what it took so far; None before the first step."""
        if self.state != "running" or not self.progress:
            return None
        return (time.monotonic() - self.started) * (1 - self.progress) / self.progress

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, or so long; returns whether it has."""
        return self._ended.wait(seconds)

    def pieces(self, item: int, first: int = 0) -> list[Tensor]:
        """Successive (C, any) of a sound as far as it is decoded, from piece number `first` on."""
        return self._pieces[item][first:]

    def audio(self, item: int) -> Tensor:
        """A sound (C, T) as far as it is decoded, float32; full scale is 1 and may be exceeded.

        What goes on from a sound begins with that, and is turned down where it would exceed full scale.
        """
        return torch.cat(self._pieces[item], 1)

    @property
    def size(self) -> int:
        """Bytes of its sounds."""
        return _RECORD + sum(4 * piece.numel() for pieces in self._pieces for piece in pieces)

    def _add(self, item: int, piece: Tensor) -> None:
        if not piece.isfinite().all():
            raise UserError("the audio holds NaN or infinite samples (try dtype float32)")
        # A copy: the piece may be a small part of a decoder's chunk, which would stay with it.
        self._pieces[item].append(piece.clone() if self._leveller is None else self._leveller.levelled(piece))

    def _end(self, state: State, error: str = "") -> None:
        self.state, self.error, self.finished = state, error, time.monotonic()
        self.plan = None  # and the sounds that it was made from
        if state == "done":
            self.progress = 1.0
        else:
            self._pieces = [[] for _ in self._pieces]
        self._ended.set()


class Jobs:
    """The queue, its worker and the results, until they expire; may be used from several threads.

    Attributes:
        store: of the models.
        bounds: of the queue.
        totals: counts since the start.
        stopping: whether no more jobs are taken.
        kept_bytes: memory of the results that are kept.
    """

    def __init__(self, store: ModelStore, bounds: Bounds | None = None):
        """Start the worker."""
        self.store, self.bounds, self.totals, self.stopping = store, bounds or Bounds(), Totals(), False
        self._instance, self._issued = secrets.token_hex(4), 0
        self.kept_bytes = 0
        self._jobs: dict[str, Job] = {}  # all that are known, by id
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._kept: collections.deque[Job] = collections.deque()  # those that have ended, the oldest first
        self._pace = 1.0  # seconds of a batch, roughly
        self._changed = threading.Condition(threading.RLock())
        self._worker = threading.Thread(target=self._work, name="sampling", daemon=True)
        self._worker.start()

    def submit(self, choice: ModelChoice, plan: Plan) -> Job:
        """Queue a plan.

        Raises:
            UserError: a prompt is too long, which may be that inside a sound.
            QueueFull: too many jobs wait.
            Stopping: after `stop`.
        """
        if (length := max(map(len, _texts(plan)), default=0)) > MOST_CHARACTERS:
            raise UserError(f"prompt: at most {MOST_CHARACTERS} characters here, got {length}; say it in fewer")
        with self._changed:
            if self.stopping:
                raise Stopping("the server is stopping; try again in a moment")
            if len(self._queue) >= self.bounds.waiting:
                self.totals.refused += 1
                raise QueueFull(len(self._queue), max(math.ceil(self._pace), 1))
            identity = f"{self._instance}-{self._issued}-{secrets.token_hex(8)}"
            job = Job(identity, choice, plan, self.store.outline(choice))
            self._issued += 1
            self._jobs[job.id] = job
            self._queue.append(job)
            self._changed.notify_all()
            return job

    def get(self, identity: str) -> Job:
        """Find a job.

        Raises:
            NoJob: it has expired, is another process's, or there is none.
        """
        self._sweep()
        if (job := self._jobs.get(identity)) is not None:
            return job
        match = re.fullmatch(r"([0-9a-f]{8})-(\d{1,18})-[0-9a-f]{16}", identity)
        if match and match[1] != self._instance:
            line = "the server was started again since, or it is another process's; send the request again"
            raise NoJob(f"job {identity}: is not known here, {line}", gone=True)
        if match and int(match[2]) < self._issued:
            raise NoJob(f"job {identity}: has expired; send the request again", gone=True)
        raise NoJob(f"there is no job {identity[:80]!r}", gone=False)

    def cancel(self, identity: str) -> Job:
        """Cancel a job, between two steps where it runs; one that has ended stays as it is.

        Raises:
            NoJob: as `get`.
        """
        job = self.get(identity)
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            self._end(job, "cancelled")
        return job

    def position(self, job: Job) -> int | None:
        """Number of jobs that wait before this one; None unless it waits."""
        with self._changed:
            return self._queue.index(job) if job in self._queue else None

    def expires_seconds(self, job: Job) -> float | None:
        """Time until a job that has ended is forgotten, at the latest."""
        return max(job.finished + self.bounds.keep_seconds - time.monotonic(), 0.0) if job.ended else None

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of jobs that are being made."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """True where nothing waits or runs, and each client has seen how its job ended."""
        with self._changed:
            return not self._queue and not self._running and all(job.collected for job in self._kept)

    def stop(self, at_once: bool = False) -> None:
        """Take no more jobs and hand back those that wait; what runs goes on, or with `at_once` is handed back too."""
        with self._changed:
            self.stopping = True
            for job in self._queue:
                self._end(job, "failed", "the server is stopping and did not begin this; send the request again")
            self._queue.clear()
            for job in self._running if at_once else ():
                self._end(job, "failed", "the server stopped before this was complete; send the request again")
            self._changed.notify_all()

    def close(self) -> None:
        """Stop at once, and wait for the worker, which ends after its present step."""
        self.stop(at_once=True)
        self._worker.join()

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            self._make(batch)
            with self._changed:
                self._running = []
                taken = time.monotonic() - began
                self._pace += 0.3 * (taken - self._pace)
                self.totals.worked += taken
            del batch  # and the sounds that it was made from, while waiting

    def _next(self) -> list[tuple[Job, Plan]]:
        """Wait for jobs and take the oldest, with those that fit it; none where the worker is to end."""
        with self._changed:
            while not self._queue:
                if self.stopping:
                    return []
                self._changed.wait(_SWEEP_SECONDS)
                self._sweep()
            first, batch, items = self._queue[0], [], 0
            for job in list(self._queue):
                plan, alike = job.plan, job.choice == first.choice
                assert plan is not None and first.plan is not None, "a job that has ended waits"
                if job is first or (alike and items + job.items <= self.bounds.batch and plan.fits(first.plan)):
                    batch.append((job, plan))
                    items += job.items
                    job.state, job.started = "running", time.monotonic()
                    self.totals.waited += job.started - job.created
            self._running = [job for job, _ in batch]
            self._queue = [job for job in self._queue if job.state == "queued"]
            return batch

    def _make(self, batch: list[tuple[Job, Plan]]) -> None:
        """Make the sounds of jobs that fit together."""
        error = ""
        try:
            model = self.store.load(batch[0][0].choice)
            for job, plan in batch:
                job.settings, job.notes = model.settings(plan), model.remarks(_texts(plan))
            self._render(model, batch)
        except _Stop as stop:
            error = str(stop)
        except Exception as fault:
            if (line := explained(fault)) is None:
                _log.exception("a job failed")
                line = "an error inside; the server's log says more"
            error = line
        for job, _ in batch:
            self._end(job, "failed" if error else "done", error)

    def _render(self, model: StableAudio, batch: list[tuple[Job, Plan]]) -> None:
        began, longest = time.monotonic(), self.bounds.work_seconds
        places = [(job, item) for job, plan in batch for item in range(len(plan.items))]
        joined = replace(batch[0][1], items=[item for _, plan in batch for item in plan.items])
        done, total, decoded = 0, 0, 0.0  # steps, and seconds of sound

        def check(steps: int = 0, of: int = 0) -> None:
            nonlocal done, total
            if all(job.ended for job, _ in batch):
                raise _Stop("cancelled")
            if time.monotonic() - began > longest:
                raise _Stop(f"took longer than {longest:g} s; ask for fewer steps, or for less sound")
            done, total = (steps, of) if of else (done, total)
            decoding = _DECODING * max(total / joined.request.steps, 1)
            heard = decoded / (len(places) * joined.request.seconds)
            for job, _ in batch:
                job.progress = min((done + decoding * heard) / (total + decoding), 1.0)

        self.totals.batches += 1
        self.totals.items += len(places)
        for place, piece in model.render(joined, self.bounds.batch, check):
            job, item = places[place]
            with self._changed:
                if not job.ended:
                    job._add(item, piece)
            decoded += piece.shape[1] / model.sample_rate
            self.totals.sound += piece.shape[1] / model.sample_rate
            check()

    def _end(self, job: Job, state: State, error: str = "") -> None:
        with self._changed:
            if not job.ended:
                job._end(state, error)
                job.collected = state == "cancelled"
                self.totals.finished[state] += 1
                self._kept.append(job)
                self.kept_bytes += job.size
                self._sweep()

    def _sweep(self) -> None:
        """Let results expire that are too old, or too many."""
        with self._changed:
            now = time.monotonic()
            while self._kept and (
                now - self._kept[0].finished > self.bounds.keep_seconds
                or (self.kept_bytes > self.bounds.keep_bytes and len(self._kept) > 1)
            ):
                old = self._kept.popleft()
                self.kept_bytes -= old.size
                del self._jobs[old.id]


def _texts(plan: Plan) -> list[str]:
    """All that the model reads."""
    return [text for text in (*(prompt for prompt, _ in plan.items), plan.request.negative) if text is not None]
