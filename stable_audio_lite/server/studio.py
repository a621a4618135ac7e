"""The page's work without its looks: a filled-in form becomes a job, and a job's sounds become files.

studio = Studio(Jobs(ModelStore()), folder)
wish = Wish(prompt="solo piano, slow", model="starter")
job = studio.submit(wish)
job.wait()
studio.collect(job, wish)  # [Made(path=..., settings={"prompt": "solo piano, slow", ...}, ...)]
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.audio.plot import spectrogram_webp
from stable_audio_lite.edits import Edit, Inpainting, Loop, Sound, Variation
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import file_stem, replacing
from stable_audio_lite.pipeline import Plan, StableAudio
from stable_audio_lite.request import milliseconds
from stable_audio_lite.server.jobs import Job, Jobs
from stable_audio_lite.server.models import ModelChoice
from stable_audio_lite.server.sounds import read_sound
from stable_audio_lite.wording import beats_of, tempo_of

Way = Literal["new", "loop", "variation", "stretch", "continuation"]
"""Ways to make a sound: from words, its end at its beginning, over another, a part of another anew, after another."""

FROM_SOUND: tuple[Way, ...] = ("variation", "stretch", "continuation")
"""Ways that start from a sound."""

MOST_SOUNDS, MOST_STEPS, MOST_SECONDS, MOST_SOURCE_SECONDS = 8, 200, 60.0, 300.0
"""Limits of one wish: sounds, sampling steps, and seconds of what is made and of a sound to start from."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A form as its user filled it in; None where a field is empty, for the model's own value.

    Attributes:
        way: of making the sound.
        prompt, negative: words; "" for none.
        seconds: length, or length of what follows; of a loop and of what starts from a sound, that is known otherwise.
        seed: of the first sound.
        count: sounds.
        steps, cfg: as `StableAudio.generate` takes them.
        source: file of the sound to start from.
        strength: of a variation.
        first, last: seconds between which a sound is made anew.
        bars, bpm: length of a loop, and its tempo where the prompt states none.
        model, lora: by the names of the store; "" is no LoRA.
        lora_strength: 1 is as trained.
    """

    way: Way = "new"
    prompt: str = ""
    negative: str = ""
    seconds: float | None = None
    seed: int | None = None
    count: int = 1
    steps: int | None = None
    cfg: float | None = None
    source: str | None = None
    strength: float = 0.6
    first: float | None = None
    last: float | None = None
    bars: int | None = None
    bpm: float | None = None
    model: str | None = None
    lora: str = ""
    lora_strength: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A sound that was made.

    Attributes:
        path: WAV with the settings inside.
        picture: WebP of its spectrogram.
        heights: of frequencies in Hz within the picture, from 0 to 1.
        seconds: length.
        settings: everything needed to make it again.
        wish: form that makes it alone again.
    """

    path: Path
    picture: Path
    heights: dict[int, float]
    seconds: float
    settings: dict[str, Any]
    wish: Wish


class Studio:
    """Turns wishes into jobs and files, for all who have the page open.

    Attributes:
        jobs: the queue.
        folder: for files, as long as the page runs.
        keep: where each sound stays afterwards too; None: nowhere.
    """

    def __init__(self, jobs: Jobs, folder: str | Path, keep: Path | None = None):
        """Take a queue and folders that can be written."""
        self.jobs, self.store, self.folder, self.keep = jobs, jobs.store, Path(folder), keep
        self._keeping = threading.Lock()  # names are chosen one after another

    def outline(self, wish: Wish) -> StableAudio:
        """The model of a wish, without its weights.

        Raises:
            UserError: there is no such model or LoRA.
        """
        return self.store.outline(self._choice(wish))

    def submit(self, wish: Wish) -> Job:
        """Queue a wish.

        Raises:
            UserError: something in it is wrong, or the queue is full.
        """
        choice = self._choice(wish)
        return self.jobs.submit(choice, self._plan(wish, self.store.outline(choice)))

    def collect(self, job: Job, wish: Wish) -> list[Made]:
        """Write the sounds of a job that has ended.

        Raises:
            UserError: it failed or was cancelled, or the disk is full.
        """
        if job.state != "done":
            raise UserError(job.error or "cancelled")
        return [self._made(job, item, wish) for item in range(job.items)]

    def discard(self, made: list[Made]) -> None:
        """Delete the files of a session that has ended; those that are kept stay."""
        for folder in {sound.path.parent for sound in made}:
            shutil.rmtree(folder, ignore_errors=True)

    def _choice(self, wish: Wish) -> ModelChoice:
        strength = wish.lora_strength if wish.lora else None
        return self.store.choose(wish.model, wish.lora or None, strength)

    def _plan(self, wish: Wish, model: StableAudio) -> Plan:
        _check(wish)
        prompt = wish.prompt.strip() or None
        source = read_source(wish.source, model.sample_rate) if wish.way in FROM_SOUND else None
        if prompt is None and model.conditioner is not None and not (source and source.prompt):
            raise UserError("the prompt is empty; say what you want to hear")
        negative = (wish.negative or "").strip() or None
        about: dict[str, Any] = {"steps": wish.steps, "cfg": wish.cfg, "negative": negative, "seed": wish.seed}
        if wish.way == "continuation":
            if wish.seconds is None:
                raise UserError("length: say how many seconds should follow")
            return model.plan_extension(prompt, after=source, seconds=wish.seconds, **about)
        edit, seconds = Edit(), wish.seconds
        if wish.way == "loop":
            (edit, prompt), seconds = _loop(wish, prompt or ""), None
        elif source is not None:
            longest = model.window_seconds
            edit, seconds = (
                Variation(source, wish.strength),
                milliseconds(longest) if source.seconds > longest else None,
            )
            if wish.way == "stretch":
                if wish.first is None or wish.last is None:
                    raise UserError("stretch: choose it on the waveform, or give its first and last second")
                edit = Inpainting(source, ((wish.first, wish.last),))
        return model.plan(prompt, seconds=seconds, count=wish.count, edit=edit, **about)

    def _made(self, job: Job, item: int, wish: Wish) -> Made:
        settings, audio = job.settings[item], job.audio(item)
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="sound-"))
        path = folder / f"{file_stem(settings.get('prompt') or '')}-{settings['seed']}.wav"
        write_audio(path, audio, job.sample_rate, settings)
        picture, heights = spectrogram_webp(audio, job.sample_rate)
        path.with_suffix(".webp").write_bytes(picture)
        if self.keep is not None:
            with self._keeping, replacing(_free(self.keep / path.name)) as temporary:
                shutil.copyfile(path, temporary)
        return Made(
            path=path,
            picture=path.with_suffix(".webp"),
            heights=heights,
            seconds=audio.shape[1] / job.sample_rate,
            settings=settings,
            wish=replace(wish, seed=settings["seed"], count=1),
        )


def read_source(path: str | None, sample_rate: int = 44100) -> Sound:
    """Read an uploaded sound; its name, not its path, is what settings and messages tell.

    Raises:
        UserError: there is none, or none any more, it is not audio, or too long.
    """
    if not path:
        raise UserError("sound: give the one to start from")
    try:
        data = Path(path).read_bytes()
    except OSError as error:  # files of a page that is open for long are deleted
        raise UserError("sound: is no longer there; give it again") from error
    sound = read_sound(data, sample_rate, MOST_SOURCE_SECONDS)
    return replace(sound, name=Path(path).name)


def peaks(path: str, columns: int = 400) -> tuple[list[float], float]:
    """Largest magnitudes of successive parts of a sound, of 1 at most, and its length in seconds.

    Raises:
        UserError: as `read_source`.
    """
    sound = read_source(path)
    magnitudes = sound.audio.abs().amax(0).numpy()
    edges = np.linspace(0, len(magnitudes), columns + 1).astype(int)[:-1]
    tops = np.maximum.reduceat(magnitudes, np.minimum(edges, len(magnitudes) - 1))
    return [round(float(top), 3) for top in tops / max(tops.max(), 1e-4)], sound.seconds


def _check(wish: Wish) -> None:
    if wish.way not in get_args(Way):
        raise UserError(f"way: is one of {', '.join(get_args(Way))}, got {wish.way!r}")
    if wish.count is None or wish.count < 1:
        raise UserError(f"sounds: say how many, 1 to {MOST_SOUNDS}")
    for name, value, most in (
        ("sounds", wish.count, MOST_SOUNDS),
        ("steps", wish.steps, MOST_STEPS),
        ("length", wish.seconds, MOST_SECONDS),
    ):
        if value is not None and not value <= most:
            raise UserError(f"{name}: at most {most:g} here, got {value:g}")


def _loop(wish: Wish, prompt: str) -> tuple[Loop, str]:
    """The loop, and its prompt, which states its tempo."""
    said = tempo_of(prompt)
    bpm = said or wish.bpm
    return Loop(wish.bars, bpm, beats_of(prompt)), prompt if said or not bpm else f"{prompt}, {bpm:g} bpm"


def _free(path: Path) -> Path:
    """The path, or one with a number behind its name that isn't taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
