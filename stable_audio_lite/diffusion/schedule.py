"""The cosine v-schedule (Salimans & Ho 2022, arXiv 2202.00512): x_t = cos(pi t/2) x0 + sin(pi t/2) eps.

Times t run from 0 (clean) to 1 (noise). sigma = tan(pi t/2) is the noise level of x_t / alpha, which is how
samplers count. Times and sigmas are (B,) against data (B, ...); all functions are pure.
"""

from __future__ import annotations

import math

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
