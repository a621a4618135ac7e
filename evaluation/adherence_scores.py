"""Shares of right facts over many sounds, and how far their levels and embeddings are from those of recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.judge import FACTS, Analysis, Request, right_facts
from evaluation.metrics.bootstrap import interval
from evaluation.metrics.frechet import Gaussian, frechet_distance
from stable_audio_lite.corpus.instruments import INSTRUMENTS

WIDTH_KEPT_DB = 3.0
"""dB by which a VAE may change a width and still have kept it."""


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


def score_adherence(
    requests: Sequence[Request],
    recordings: Sequence[Analysis],
    generated: Sequence[Analysis] = (),
    vae: Sequence[Analysis] = (),
) -> Adherence:
    """Score the sounds made for `requests`, and the recordings through a VAE; either may be missing."""
    others = {"generated": generated, "VAE": vae}
    valley = {k: level for k, v in others.items() if (level := valley_difference(requests, v, recordings))}
    kept = [abs(a.width - b.width) <= WIDTH_KEPT_DB for a, b in zip(vae, recordings, strict=False)]
    return Adherence(
        measures=tuple(shares_right(requests, recordings, generated, vae)),
        valley=valley,
        width_kept=float(np.mean(kept)) if kept else None,
        frechet=clap_distances(recordings, generated, vae),
    )


def shares_right(
    requests: Sequence[Request],
    recordings: Sequence[Analysis],
    generated: Sequence[Analysis] = (),
    vae: Sequence[Analysis] = (),
    seed: int = 0,
) -> list[ShareRight]:
    """Shares of every fact that some prompt states."""

    def rows(sounds: Sequence[Analysis], shift: int = 0) -> list[dict[str, float]]:
        """Right facts of each sound by its own request, or the one `shift` further."""
        found = []
        for number, sound in enumerate(sounds):
            other = (number + shift) % len(requests)
            request = requests[other]
            seconds = requests[other].seconds if shift else sound.seconds
            facts = right_facts(sound, request.item.truth, request.prompt, seconds, recordings[other].width)
            found.append(facts)
        return found

    real, made, shuffled, passed = rows(recordings), rows(generated), rows(generated, 1), rows(vae)
    shares = []
    for name in FACTS:
        if not (ceiling := _values(real, name)):
            continue
        values, floor, through = (_values(found, name) for found in (made, shuffled, passed))
        low, high = interval(values, seed) if values else (None, None)
        means = {"ceiling": ceiling, "value": values, "floor": floor, "vae": through}
        known = {key: float(np.mean(v)) for key, v in means.items() if v}
        shares.append(ShareRight(name=name, n=len(ceiling), low=low, high=high, **known))
    return shares


def _values(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def valley_difference(
    requests: Sequence[Request], sounds: Sequence[Analysis], recordings: Sequence[Analysis]
) -> MedianDifference | None:
    """Level between partials of each sound minus that of its recording, over sustained solos that are not silent."""
    pairs = zip(requests, sounds, recordings, strict=False)
    differences = np.array([s.valley - r.valley for q, s, r in pairs if is_sustained_solo(q)])
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    low, high = interval(differences, statistic=np.median)
    return MedianDifference(n=len(differences), median=float(np.median(differences)), low=low, high=high)


def is_sustained_solo(request: Request) -> bool:
    """True where one instrument that sounds until it is released plays alone."""
    names = request.item.truth.get("instruments", ())
    instrument = INSTRUMENTS.get(names[0]) if len(names) == 1 else None
    return instrument is not None and instrument.decay == "held" and not request.item.truth.get("drums")


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
