"""Fréchet distance between two sets of embeddings, taken as Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)

In float64. The square roots are of symmetric matrices, by their eigenvalues, so that none needs a small constant added,
and covariances of fewer samples than dimensions are as good as others. The distance is biased: with fewer samples it is
larger. Compare those of equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """The squared distance, 0 for equal Gaussians and never below."""
    root = _root(one.covariance)
    middle = root @ other.covariance @ root
    shared = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    apart = (one.mean - other.mean).square().sum()
    return max(0.0, float(apart + one.covariance.trace() + other.covariance.trace() - 2 * shared))


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
