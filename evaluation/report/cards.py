"""Single sounds as a page shows them: picture, player, facts, the recording beside them, nearest training sounds."""

from __future__ import annotations

import base64
import io
import math
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from evaluation.result import Result, SoundRecord, format_value, partners
from stable_audio_lite.audio.plot import time_ticks
from stable_audio_lite.errors import UserError

PICTURED_SECONDS = 600.0
"""Of each sound at most, so that memory doesn't grow with its length."""

_FACTS = {"end": ("ends", "s"), "width": ("width", "dB"), "level": ("loudness", "LUFS")}
_FACTS |= {name: (f"{name} novelty", "dB") for name in ("intro", "development", "outro")}
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sound as the page shows it.

    Attributes:
        label: "generated" or "real".
        player: address of what plays: the file, or a copy inside the page; None where it can't be read.
        picture: address of its spectrogram; None where it can't be read.
        trouble: why it can't be read, or "".
        heights: of frequencies in Hz within the picture, from 0 to 1.
        times: (share of the picture's width, text) along its lower edge.
        marks: (share of the picture's width, "asked" or "ends").
        facts: what is known of it, pairs of texts.
    """

    label: str
    sound: SoundRecord
    player: str | None
    picture: str | None
    trouble: str
    heights: dict[int, float]
    times: tuple[tuple[float, str], ...]
    marks: tuple[tuple[float, str], ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Paths of the page and of the result, and whether sounds are copied into the page."""

    page: Path
    result: Path
    embed: bool = False

    def find(self, path: str) -> Path | None:
        """The file of a sound by its path, as given or from the result's folder; None where there is none."""
        try:
            return next((place for place in (Path(path), self.result.parent / path) if place.is_file()), None)
        except (OSError, ValueError):  # no path at all
            return None

    def link(self, path: str) -> str | None:
        """Address on the page of a sound's file, relative where it can be; None where there is no file."""
        if (file := self.find(path)) is None:
            return None
        try:
            relative = os.path.relpath(file.absolute(), self.page.absolute().parent)
        except ValueError:  # on another drive
            return file.absolute().as_uri()
        return urllib.parse.quote(os.fsencode(Path(relative).as_posix()))


def most_similar(result: Result, count: int = 20) -> list[tuple[SoundRecord, float | None]]:
    """The `count` generated sounds that are most like a training sound, the closest first.

    With each, the share of the recordings that are less like any training sound; None where no recording tells.
    """
    usual = [sound.nearest[0].cosine for sound in result.reference if sound.nearest]
    cosines = [(sound.nearest[0].cosine, sound) for sound in result.generated if sound.nearest]
    closest = sorted(cosines, key=lambda pair: pair[0], reverse=True)[:count]
    return [(sound, sum(v < cosine for v in usual) / len(usual) if usual else None) for cosine, sound in closest]


def prompt_groups(result: Result) -> list[tuple[str, list[tuple[str, SoundRecord]]]]:
    """Prompts, or names where there are none, each with its generated sounds and the recording beside them."""
    found: dict[str, list[tuple[str, SoundRecord]]] = {}
    real: dict[str, SoundRecord] = {}
    for sound, partner in zip(result.generated, partners(result.generated, result.reference), strict=True):
        title = sound.prompt or (partner.prompt if partner else "") or PurePath(sound.path).stem
        found.setdefault(title, []).append(("generated", sound))
        if partner:
            real.setdefault(title, partner)
    return [(title, [*rows, ("real", real[title])] if title in real else rows) for title, rows in found.items()]


def card(label: str, sound: SoundRecord, places: Places) -> Card:
    """The card of `sound`; where its file is missing or broken, without picture and player."""
    player, picture, trouble = None, None, ""
    heights: dict[int, float] = {}
    try:
        if (file := places.find(sound.path)) is None:
            raise UserError(
                f"{sound.path}: no such file here or beside the result; put it back, or evaluate where it lies now"
            )
        picture, heights = _picture(file)
        player = _mp3(file) if places.embed else places.link(sound.path)
    except UserError as error:
        trouble = str(error)
    span = min(sound.seconds, PICTURED_SECONDS)
    seconds = {"asked": sound.requested, "ends": sound.measurements.get("end")}
    return Card(
        label=label,
        sound=sound,
        player=player,
        picture=picture,
        trouble=trouble,
        heights=heights,
        times=time_ticks(span),
        marks=tuple((second / span, name) for name, second in seconds.items() if second and 0 < second <= span),
        facts=_facts(sound),
    )


def _facts(sound: SoundRecord) -> tuple[tuple[str, str], ...]:
    stereo = {1: "mono", 2: "stereo"}.get(sound.channels, f"{sound.channels} channels")
    facts = [
        ("length", f"{format_value(sound.seconds)} s"),
        ("stored as", f"{sound.sample_rate / 1000:g} kHz {stereo}"),
    ]
    if sound.requested is not None:
        facts.append(("asked for", f"{format_value(sound.requested)} s"))
    for key, value in sound.measurements.items():
        name, unit = _FACTS.get(key, (key, ""))
        facts.append((name, f"{format_value(value)} {unit}".strip()))
    if sound.seconds > PICTURED_SECONDS:
        facts.append(("pictured", f"the first {PICTURED_SECONDS:g} s"))
    return (*facts, *(("treatment", text) for text in sound.treatment))


def _picture(file: Path) -> tuple[str, dict[int, float]]:
    from stable_audio_lite.audio.plot import spectrogram_webp

    picture, heights = spectrogram_webp(*_read(file, PICTURED_SECONDS))
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}", heights


def _read(file: Path, seconds: float = math.inf) -> tuple[np.ndarray, int]:
    """(C, T) samples, of more than two channels mixed to two, and their rate in Hz; without torch, slow to load."""
    from stable_audio_lite.audio.io import audio_blocks, audio_info

    info = audio_info(file)
    rate = info.sample_rate
    blocks, length = [], 0
    for block in audio_blocks(file, stereo=info.channels > 2):
        blocks.append(block)
        length += block.shape[1]
        if length >= seconds * rate:
            break
    return np.concatenate(blocks, 1)[:, : round(min(length, seconds * rate))], rate


def _mp3(file: Path) -> str:
    import soundfile

    from stable_audio_lite.audio.io import resample

    samples, own = _read(file)
    rate = own if own in _MP3_RATES else 44100
    buffer = io.BytesIO()
    soundfile.write(buffer, resample(samples, own, rate).clip(-1, 1).T, rate, format="MP3")
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
