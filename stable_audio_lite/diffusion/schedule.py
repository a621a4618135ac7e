"""Noise schedules: the cosine v-schedule in continuous time, and DDPM's, which count steps.

The first (Salimans & Ho 2022, arXiv 2202.00512) is x_t = cos(pi t/2) x0 + sin(pi t/2) eps, with times t from 0 (clean)
to 1 (noise). sigma = tan(pi t/2) is the noise level of x_t / alpha, which is how samplers count. Times and sigmas are
(B,) against data (B, ...); all functions are pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of signal and noise at times t: cos(pi t/2), sin(pi t/2)."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def t_to_sigma(t: Tensor) -> Tensor:
    """Noise-to-signal ratio tan(pi t/2) of times t in 0..1 (exclusive)."""
    return (t * (math.pi / 2)).tan()


def sigma_to_t(sigma: Tensor) -> Tensor:
    """The time whose noise-to-signal ratio is sigma: 2/pi atan(sigma)."""
    return sigma.atan() * (2 / math.pi)


def like(values: Tensor, data: Tensor) -> Tensor:
    """Give (B,) values trailing axes so that they multiply data (B, ...)."""
    return values.reshape(-1, *[1] * (data.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps."""
    alpha, sigma = alpha_sigma(like(t, x0))
    return alpha * x0 + sigma * eps


def v_target(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a v-predicting network learns: v = alpha eps - sigma x0."""
    alpha, sigma = alpha_sigma(like(t, x0))
    return alpha * eps - sigma * x0


def x0_from_v(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = alpha x_t - sigma v."""
    alpha, sigma = alpha_sigma(like(t, x_t))
    return alpha * x_t - sigma * v


_MOST_BETA = 0.999


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """DDPM's forward process (Ho et al. 2020, arXiv 2006.11239).

    Attributes:
        kind: "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672) or "linear" betas.
        steps: how many there are.
    """

    kind: Literal["cosine", "linear"] = "cosine"
    steps: int = 4000

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")


class DiscreteSchedule:
    """x_i = sqrt(abar_i) x0 + sqrt(1 - abar_i) eps for steps i = 0 .. steps - 1; the last is noise.

    Attributes:
        abar: (steps,) float64, the signal's share of the variance.
    """

    def __init__(self, config: ScheduleConfig):
        steps = config.steps
        if config.kind == "cosine":
            grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            kept = (((grid + 0.008) / 1.008) * (math.pi / 2)).cos().square()
            beta = (1 - kept[1:] / kept[:-1]).clamp(max=_MOST_BETA)
        else:  # the total of a thousand steps from 1e-4 to 0.02, whatever their number
            ends = (1e-4 * 1000 / steps, min(0.02 * 1000 / steps, _MOST_BETA))
            beta = torch.linspace(*ends, steps, dtype=torch.float64)
        self.abar = (1 - beta).cumprod(0)
        self._log_sigma = ((1 - self.abar) / self.abar).log() / 2

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.abar)

    def sigma(self, step: Tensor) -> Tensor:
        """Noise level sqrt((1 - abar) / abar) of steps (B,), log-linear between whole ones."""
        place = step.detach().cpu().double().clamp(0, self.steps - 1)
        low = place.long().clamp(max=self.steps - 2)
        return self._log_sigma[low].lerp(self._log_sigma[low + 1], place - low).exp().float().to(step.device)

    def step(self, sigma: Tensor) -> Tensor:
        """The step (B,), a fraction between two, whose noise level is sigma (B,); the nearest there is beyond them."""
        wanted = sigma.detach().cpu().double().log().clamp(self._log_sigma[0], self._log_sigma[-1])
        low = (torch.searchsorted(self._log_sigma, wanted) - 1).clamp(0, self.steps - 2)
        part = (wanted - self._log_sigma[low]) / (self._log_sigma[low + 1] - self._log_sigma[low])
        return (low + part).float().to(sigma.device)

    def add_noise(self, x0: Tensor, eps: Tensor, step: Tensor) -> Tensor:
        """x_i of data and noise (B, ...) at whole steps (B,)."""
        abar = like(self.abar[step.cpu()], x0).to(x0.device)
        return abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * eps


def polyexponential_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Noise levels for `steps` sampler steps: sigma_max down to sigma_min, then 0.

    Equal steps in log sigma for rho = 1; a larger rho spends more of them at low noise.

    Returns:
        (steps + 1,) float32 on the CPU.

    Raises:
        ValueError: steps < 1, rho <= 0, or not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if rho <= 0:
        raise ValueError(f"rho must be above 0, got {rho}")
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    sigmas = torch.exp(low + ramp * (high - low))
    return torch.cat((sigmas, sigmas.new_zeros(1))).float()
