"""Fréchet distance between two sets of embeddings, taken as Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)

In float64. The last trace is the sum of the singular values of S1^1/2 S2^1/2, and each root that of a symmetric matrix,
by its eigenvalues, so that nothing has to be added to either, and covariances of fewer samples than dimensions are as
good as others. The distance is biased: with fewer samples it is larger. Compare those of equally many, or
`frechet_infinity` (Chong & Forsyth 2020, arXiv 1911.07023).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing

_KEYS = (("mu_ref", "sigma_ref"), ("mu", "sigma"))
_SMALLEST_SHARE = 0.2  # of the samples, from which the distance is extrapolated
_BLOCK = 1 << 20  # numbers of an embedding file that are in memory at once


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, embeddings: Tensor) -> Gaussian:
        """Of the rows of (N, D), the covariance with N - 1 in its denominator.

        Raises:
            ValueError: there are fewer than two.
        """
        if embeddings.ndim != 2 or len(embeddings) < 2:
            raise ValueError(f"expected (N, D) embeddings of at least 2 sounds, got {tuple(embeddings.shape)}")
        rows = embeddings.double()
        return cls(rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]))

    @cached_property
    def root(self) -> Tensor:
        """A factor R (D, rank) of the covariance, R R^T; what its eigenvalues lose to rounding is left out."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        return vectors[:, kept] * values[kept].sqrt()


class EmbeddingRows:
    """Embeddings of sounds, several rows each, in a temporary file, so that memory doesn't grow with them.

    Attributes:
        counts: rows of each sound.
        width: of a row.
    """

    def __init__(self, embeddings: Iterable[Tensor]):
        """Write the (rows, width) `embeddings` of each sound."""
        self.counts: list[int] = []
        self.width = 0
        self._file = tempfile.TemporaryFile()
        for rows in embeddings:
            self.counts.append(len(rows))
            self.width = rows.shape[1]
            self._file.write(rows.float().contiguous().numpy().tobytes())

    def __enter__(self) -> EmbeddingRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[Tensor]:
        """All rows, some thousand at once, (n, width) float64."""
        size = max(1, _BLOCK // self.width)
        self._file.seek(0)
        while data := self._file.read(4 * size * self.width):
            yield torch.from_numpy(np.frombuffer(data, np.float32).reshape(-1, self.width).astype(np.float64))

    def gaussian(self, weights: Tensor | None = None) -> Gaussian:
        """Mean and covariance, each sound counted `weights` (sounds,) times, by default once.

        Raises:
            ValueError: fewer than two rows count.
        """
        times = torch.ones(len(self.counts)) if weights is None else weights
        each = times.double().repeat_interleave(torch.tensor(self.counts))
        total = float(each.sum())
        if total < 2:
            raise ValueError(f"expected at least 2 embeddings, got {total:g}")
        first, sums = 0, torch.zeros(self.width, dtype=torch.float64)
        products = torch.zeros(self.width, self.width, dtype=torch.float64)
        shift: Tensor | None = None  # keeps what is summed small beside what it varies by
        for block in self.blocks():
            shift = block[0] if shift is None else shift
            block = block - shift
            weighted = block * each[first : first + len(block), None]
            sums += weighted.sum(0)
            products += weighted.T @ block
            first += len(block)
        assert shift is not None
        mean = sums / total
        covariance = (products - total * mean.outer(mean)) / (total - 1)
        return Gaussian(mean + shift, (covariance + covariance.T) / 2)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """The squared distance, 0 for equal Gaussians and never below."""
    shared = torch.linalg.svdvals(one.root.T @ other.root).sum()
    apart = (one.mean - other.mean).square().sum()
    return max(0.0, float(apart + one.covariance.trace() + other.covariance.trace() - 2 * shared))


def frechet_infinity(draw: Callable[[int], Gaussian], count: int, reference: Gaussian, sizes: int = 15) -> float:
    """The distance that infinitely many samples would have: over 1 / N it is a line, whose value at 0 this is.

    `draw` gives a Gaussian of that many of the `count` samples, drawn anew; the `reference` stays as it is. The line is
    fitted to distances of `sizes` numbers of samples, from a fifth of them to all.
    """
    numbers = np.unique(np.linspace(max(2, _SMALLEST_SHARE * count), count, sizes).round().astype(int))
    distances = [frechet_distance(draw(int(number)), reference) for number in numbers]
    if len(numbers) < 2:
        return distances[0]
    return float(np.polyfit(1 / numbers, distances, 1)[1])


def save_statistics(path: Path, gaussian: Gaussian, settings: dict[str, Any]) -> None:
    """Write a `.npz` as stable-audio-metrics does, "mu_ref" and "sigma_ref", with the embedder's settings beside them.

    Raises:
        UserError: it can't be written.
    """
    arrays = {"mu_ref": gaussian.mean.numpy(), "sigma_ref": gaussian.covariance.numpy()}
    with replacing(path) as temporary:
        np.savez(temporary, **arrays, settings=np.array(json.dumps(settings)))


def load_statistics(path: Path) -> tuple[Gaussian, dict[str, Any] | None]:
    """Read a `.npz` of stable-audio-metrics (or one with "mu" and "sigma"), and the settings if it has ours.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = next((file[m], file[s]) for m, s in _KEYS if m in file and s in file)
            settings = json.loads(str(file["settings"])) if "settings" in file else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give statistics, a .npz, or a folder of recordings") from error
    except Exception as error:  # NumPy raises what its archive, its array or its text does
        raise UserError(f"{path}: no statistics with 'mu_ref' and 'sigma_ref', or damaged; fetch it again") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: its mean {mean.shape} and covariance {covariance.shape} don't fit each other")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: holds NaN or infinite numbers; make it again")
    return Gaussian(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()), settings
