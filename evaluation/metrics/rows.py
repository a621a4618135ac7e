"""Embeddings of many sounds, streamed from disk into one Gaussian."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.frechet import Gaussian

_BLOCK = 1 << 20  # numbers of an embedding file that are in memory at once


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
