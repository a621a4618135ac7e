"""Diffusion processes: how data become noise over time, and what a network learns to predict.

x_t = alpha_t x0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1. Samplers count by the noise level of x_t / alpha_t:
sigma = sigma_t / alpha_t. `CosineProcess` has continuous times, `DiscreteProcess` DDPM's steps. Times and noise levels
are (B,) against data (B, ...); all functions are pure.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["v", "eps", "x0"]
_MAX_BETA = 0.999


def append_dims(values: Tensor, data: Tensor) -> Tensor:
    """Append axes of size 1 to (B,) values so that they broadcast against data (B, ...)."""
    return values.reshape(-1, *[1] * (data.ndim - 1))


class Process(ABC):
    """A forward process, and the objective of the networks trained with it.

    Args:
        objective: the network's prediction: v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv 2202.00512), the noise
            eps, or the clean data x0.

    Raises:
        ValueError: the objective is none of these.
    """

    def __init__(self, objective: Objective):
        if objective not in ("v", "eps", "x0"):
            raise ValueError(f"objective must be v, eps or x0, got {objective!r}")
        self.objective = objective

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of data and noise at times t."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The time at which sigma is the noise level."""

    @abstractmethod
    def at(self, share: Tensor) -> Tensor:
        """Quantile of the times: the time below which that share, 0..1, of them lies."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mix data and noise (B, ...) to x_t at times (B,)."""
        alpha, sigma = self._weights(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The ideal prediction (B, ...) for `add_noise(x0, eps, t)`."""
        if self.objective == "v":
            alpha, sigma = self._weights(t, x0)
            return alpha * eps - sigma * x0
        return eps if self.objective == "eps" else x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Turn a prediction (B, ...) for x_t at noise levels (B,) into clean data."""
        sigma = append_dims(sigma, x_t)
        # From sigma itself: computed from t, alpha would lose its digits where there is almost only noise.
        alpha = (1 + sigma**2).rsqrt()
        if self.objective == "v":
            return alpha * x_t - alpha * sigma * prediction
        return x_t / alpha - sigma * prediction if self.objective == "eps" else prediction

    def _weights(self, t: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return append_dims(alpha, data), append_dims(sigma, data)


class CosineProcess(Process):
    """alpha = cos(pi t/2), sigma = sin(pi t/2), with times t from 0 (clean) to 1 (noise)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return angle.cos(), angle.sin()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma.atan() * (2 / math.pi)

    def at(self, share: Tensor) -> Tensor:
        return share


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """DDPM's noise schedule (Ho et al. 2020, arXiv 2006.11239).

    Attributes:
        kind: "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672) or "linear" betas.
        steps: number of steps.
    """

    kind: Literal["cosine", "linear"] = "cosine"
    steps: int = 4000

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")


class DiscreteProcess(Process):
    """alpha_i^2 = abar_i for times i = 0 .. steps - 1; the last is noise.

    Attributes:
        abar: (steps,) float64, the data's share of the variance.
    """

    def __init__(self, config: ScheduleConfig, objective: Objective):
        super().__init__(objective)
        steps = config.steps
        if config.kind == "cosine":
            grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            kept = (((grid + 0.008) / 1.008) * (math.pi / 2)).cos().square()
            beta = (1 - kept[1:] / kept[:-1]).clamp(max=_MAX_BETA)
        else:  # as much noise in total as a thousand steps from 1e-4 to 0.02 add
            ends = (1e-4 * 1000 / steps, min(0.02 * 1000 / steps, _MAX_BETA))
            beta = torch.linspace(*ends, steps, dtype=torch.float64)
        self.abar = (1 - beta).cumprod(0)
        self._log_sigma = ((1 - self.abar) / self.abar).log() / 2

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.abar)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights at whole steps, in float32."""
        abar = self.abar[t.cpu()].to(t.device)
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def time(self, sigma: Tensor) -> Tensor:
        """The step, interpolated between two; beyond the first and the last, the nearer of them."""
        wanted = sigma.detach().cpu().double().log().clamp(self._log_sigma[0], self._log_sigma[-1])
        low = (torch.searchsorted(self._log_sigma, wanted) - 1).clamp(0, self.steps - 2)
        part = (wanted - self._log_sigma[low]) / (self._log_sigma[low + 1] - self._log_sigma[low])
        return (low + part).float().to(sigma.device)

    def at(self, share: Tensor) -> Tensor:
        return (share * self.steps).long().clamp_max(self.steps - 1)
