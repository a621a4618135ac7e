"""Facts that prompts state, looked for in sounds: which of them are right, and how many over many sounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.bootstrap import interval
from evaluation.metrics.frechet import Gaussian, frechet_distance
from evaluation.metrics.levels import END_TOLERANCE, WIDTH_TOLERANCE_DB, sound_end, valley_db, width_db
from evaluation.metrics.music import TEMPO_TOLERANCE, key, tempo
from evaluation.tagger import Tagger, Tags, r_precision
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.corpus.captions import facts_told
from stable_audio_lite.corpus.instruments import INSTRUMENTS
from stable_audio_lite.data.manifest import Item

FACTS = ("families", "instruments", "drums", "style", "tempo", "tempo octave", "key", "mode", "end", "width")
WIDTH_KEPT_DB = 3.0
"""dB by which a VAE may change a width and still have kept it."""

_OCTAVES = (1 / 3, 1 / 2, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class HeldOutPrompt:
    """A held-out piece, the text for it, and the length in seconds that a sound is asked to have."""

    item: Item
    text: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Facts found in one sound; None where it is silent, or has no such thing.

    Attributes:
        seconds: the length that it should have, up to which all but its end is looked for.
        end: seconds at which the sound ends.
        width, valley: in dB, as `evaluation.metrics.levels` defines them.
        embedding: of a CLAP, (1, D).
    """

    seconds: float
    tags: Tags | None
    tempo: float | None
    tonic: str | None
    mode: str | None
    end: float
    width: float
    valley: float
    embedding: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ShareRight:
    """Mean share of right answers to one of `FACTS` over `n` sounds of each kind; None for a kind that there is not.

    Attributes:
        value, low, high: of the generated sounds, with their 95 % interval (NaN of one).
        ceiling: of the recordings.
        vae: of the recordings through the VAE.
        floor: of the generated sounds with each other's prompts.
    """

    name: str
    n: int
    ceiling: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    vae: float | None = None


@dataclass(frozen=True, kw_only=True)
class MedianDifference:
    """Median difference in dB over `n` pairs, with its 95 % interval (NaN of one)."""

    n: int
    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ClapDistances:
    """Fréchet distances of CLAP embeddings, each between `n` sounds and `n` recordings; None without the sounds."""

    n: int
    real: float
    generated: float | None = None
    vae: float | None = None


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """All that is measured of some sounds.

    Attributes:
        measures: shares of right facts.
        valley: "generated" and "VAE": level between partials minus that of the recordings, over sustained solos.
        width_kept: share of the recordings whose width the VAE changes by at most `WIDTH_KEPT_DB`.
        frechet: distances where embeddings are there.
    """

    measures: tuple[ShareRight, ...]
    valley: dict[str, MedianDifference]
    width_kept: float | None
    frechet: ClapDistances | None


def analyse(
    audio: Tensor, sample_rate: int, tagger: Tagger, clap: Clap | None = None, seconds: float | None = None
) -> Analysis:
    """Look for facts in (2, T) audio that should last `seconds`; None: all of it."""
    length = audio.shape[1] / sample_rate if seconds is None else seconds
    asked = audio[:, : round(length * sample_rate)]
    silent = not bool(asked.any())
    found = None if silent else key(asked, sample_rate)
    return Analysis(
        seconds=length,
        tags=None if silent else tagger.tag(asked, sample_rate),
        tempo=None if silent else tempo(asked, sample_rate),
        tonic=found.tonic if found else None,
        mode=found.mode if found else None,
        end=sound_end(audio, sample_rate),
        width=width_db(asked),
        valley=valley_db(asked, sample_rate),
        embedding=clap.embed_audio(asked[None], sample_rate) if clap else None,
    )


def right_facts(found: Analysis, prompt: HeldOutPrompt, seconds: float, width: float) -> dict[str, float]:
    """1 for each of `FACTS` that is right, 0 for what is wrong, of those that apply to the prompt.

    Args:
        found: in a sound.
        prompt: that the sound is held against.
        seconds: when the sound should end.
        width: of the piece's recording, in dB.
    """
    piece, tags = prompt.item.metadata, found.tags
    right: dict[str, float] = {
        "families": r_precision(tags.families, piece["families"]) if tags else 0.0,
        "instruments": r_precision(tags.instruments, piece["instruments"]) if tags else 0.0,
        "drums": bool(tags and (tags.drums > 0.5) == piece["drums"]),
        "style": bool(tags and tags.style == piece["style"]),
        "tempo": _near(found.tempo, piece["bpm"]),
        "tempo octave": any(_near(found.tempo, share * piece["bpm"]) for share in _OCTAVES),
        "key": (found.tonic, found.mode) == (piece["key"], piece["mode"]),
        "mode": found.mode == piece["mode"],
        "end": abs(found.end - seconds) <= END_TOLERANCE,
        "width": abs(found.width - width) <= WIDTH_TOLERANCE_DB,
    }
    told = facts_told(prompt.text, piece)
    unsaid = {"tempo", "tempo octave", "key", "mode", "style", "drums"} - told
    unsaid -= {"tempo octave"} if "tempo" in told else set()
    return {name: float(value) for name, value in right.items() if name not in unsaid}


def _near(bpm: float | None, wanted: float) -> bool:
    return abs((bpm or 0.0) - wanted) <= TEMPO_TOLERANCE * wanted


def score_adherence(
    prompts: Sequence[HeldOutPrompt],
    recordings: Sequence[Analysis],
    generated: Sequence[Analysis] = (),
    vae: Sequence[Analysis] = (),
) -> Adherence:
    """Score the sounds made for `prompts`, and the recordings through a VAE; either may be missing."""
    others = {"generated": generated, "VAE": vae}
    valley = {k: level for k, v in others.items() if (level := valley_difference(prompts, v, recordings))}
    kept = [abs(a.width - b.width) <= WIDTH_KEPT_DB for a, b in zip(vae, recordings, strict=False)]
    return Adherence(
        measures=tuple(shares_right(prompts, recordings, generated, vae)),
        valley=valley,
        width_kept=float(np.mean(kept)) if kept else None,
        frechet=clap_distances(recordings, generated, vae),
    )


def shares_right(
    prompts: Sequence[HeldOutPrompt],
    recordings: Sequence[Analysis],
    generated: Sequence[Analysis] = (),
    vae: Sequence[Analysis] = (),
) -> list[ShareRight]:
    """Shares of every fact that some prompt states."""

    def facts(sounds: Sequence[Analysis], shift: int = 0) -> list[dict[str, float]]:
        """Right facts of each sound by its own prompt, or by the one `shift` further."""
        rows = []
        for number, sound in enumerate(sounds):
            other = (number + shift) % len(prompts)
            seconds = prompts[other].seconds if shift else sound.seconds
            rows.append(right_facts(sound, prompts[other], seconds, recordings[other].width))
        return rows

    kinds = {"ceiling": facts(recordings), "value": facts(generated), "floor": facts(generated, 1), "vae": facts(vae)}
    shares = []
    for name in FACTS:
        values = {kind: [row[name] for row in rows if name in row] for kind, rows in kinds.items()}
        if values["ceiling"]:
            low, high = interval(values["value"]) if values["value"] else (None, None)
            means = {kind: float(np.mean(known)) for kind, known in values.items() if known}
            shares.append(ShareRight(name=name, n=len(values["ceiling"]), low=low, high=high, **means))
    return shares


def valley_difference(
    prompts: Sequence[HeldOutPrompt], sounds: Sequence[Analysis], recordings: Sequence[Analysis]
) -> MedianDifference | None:
    """Level between partials of each sound minus that of its recording, over sustained solos that are not silent."""
    pairs = zip(prompts, sounds, recordings, strict=False)
    differences = np.array([s.valley - r.valley for q, s, r in pairs if is_sustained_solo(q)])
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    low, high = interval(differences, statistic=np.median)
    return MedianDifference(n=len(differences), median=float(np.median(differences)), low=low, high=high)


def is_sustained_solo(prompt: HeldOutPrompt) -> bool:
    """True where one instrument that sounds until it is released plays alone."""
    names = prompt.item.metadata.get("instruments", ())
    instrument = INSTRUMENTS.get(names[0]) if len(names) == 1 else None
    return instrument is not None and instrument.decay == "held" and not prompt.item.metadata.get("drums")


def clap_distances(
    recordings: Sequence[Analysis], generated: Sequence[Analysis], vae: Sequence[Analysis]
) -> ClapDistances | None:
    """Fréchet distances of the first half of each kind to the other half of the recordings; None without embeddings."""
    if recordings[0].embedding is None:
        return None
    half = len(recordings) // 2
    second = _gaussian(recordings[half : 2 * half])
    kinds = {"real": recordings, "generated": generated, "vae": vae}
    distances = {k: frechet_distance(_gaussian(sounds[:half]), second) for k, sounds in kinds.items() if sounds}
    return ClapDistances(n=half, **distances)


def _gaussian(sounds: Sequence[Analysis]) -> Gaussian:
    return Gaussian.of(torch.cat([sound.embedding for sound in sounds if sound.embedding is not None]))
