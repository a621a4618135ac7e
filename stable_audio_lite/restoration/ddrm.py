"""Denoising diffusion restoration models (Kawar et al. 2022, arXiv 2201.11793).

A sample of what may have been before a linear operator and noise spoiled it, given only a denoiser of clean signals.
In the operator's spectral coordinates each step knows, of every coordinate, whether the diffusion's noise or that of
the observation is the larger, and weighs denoiser and observation accordingly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stable_audio_lite.diffusion.samplers import Denoiser
from stable_audio_lite.restoration.operators import Operator


@torch.no_grad()
def ddrm(
    denoiser: Denoiser,
    operator: Operator,
    y: Tensor,
    sigmas: Tensor,
    *,
    sigma_y: float,
    eta: float = 0.8,
    eta_b: float = 0.8,
    noise: Callable[[], Tensor],
    refine: Callable[[Tensor], Operator] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Sample x0 given y = A x0 + sigma_y * noise.

    The settings of Saito et al. 2022 (arXiv 2211.04124) are the defaults, with 50 steps and sigma_y = 1e-3.

    Args:
        denoiser: what estimates x0, as `samplers.SAMPLERS` take it.
        operator: A.
        y: (B, 2, F, T), what is observed.
        sigmas: (steps + 1,) falling noise levels; end in 0 for a clean result.
        sigma_y: standard deviation of the noise in each real coordinate of y.
        eta: share of fresh noise where the observation says nothing or is the noisier, 0..1.
        eta_b: weight of the observation where it is the cleaner, 0..1.
        noise: gives fresh standard normal noise like y at each call.
        refine: given each step's estimate of x0, a better operator to go on with.
        on_step: called as each step is done.

    Returns:
        (B, 2, F, T).

    Raises:
        ValueError: sigmas aren't falling, or a setting is out of range.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or sigmas[-1] < 0:
        raise ValueError(f"sigmas must be at least 2 falling noise levels, got {sigmas.tolist()}")
    if not (0 <= eta <= 1 and 0 <= eta_b <= 1 and sigma_y >= 0):
        raise ValueError(f"expected eta and eta_b in 0..1 and sigma_y >= 0, got {eta}, {eta_b} and {sigma_y}")
    levels = sigmas.tolist()
    x = operator.v(_start(operator.singular, operator.ut(y), levels[0], sigma_y, noise().to(y)))
    for level, below in zip(levels, levels[1:], strict=False):
        x0 = denoiser(x, x.new_full((len(x),), level))
        if refine is not None:
            operator = refine(x0)
        x = operator.v(_step(operator, operator.ut(y), x, x0, level, below, sigma_y, eta, eta_b, noise().to(y)))
        if on_step is not None:
            on_step()
    return x


def _start(singular: Tensor, seen: Tensor, level: float, sigma_y: float, z: Tensor) -> Tensor:
    """Spectral coordinates at the first noise level, p(x_T | y) of Kawar et al.; `seen` is U^T y."""
    cleaner = (singular * level > sigma_y) & (singular > 0)
    divisor = torch.where(cleaner, singular, 1)
    spread = (level**2 - (sigma_y / divisor) ** 2).clamp_min(0).sqrt()
    return torch.where(cleaner, seen / divisor + spread * z, level * z)


def _step(
    operator: Operator,
    seen: Tensor,
    x: Tensor,
    x0: Tensor,
    level: float,
    below: float,
    sigma_y: float,
    eta: float,
    eta_b: float,
    z: Tensor,
) -> Tensor:
    """Spectral coordinates at the noise level `below`, p(x_t | x_t+1, y), from x at `level` and its denoised x0."""
    singular, clean = operator.singular, operator.vt(x0)
    kept = (1 - eta**2) ** 0.5 * below
    lost = clean + kept * (operator.vt(x) - clean) / level + eta * below * z
    # Undivided by S, which may be tiny: (s / sigma_y) (ybar - x0) = (U^T y - s x0) / sigma_y.
    noisier = clean + kept * (seen - singular * clean) / (sigma_y or 1.0) + eta * below * z
    cleaner = (singular * below >= sigma_y) & (singular > 0)
    divisor = torch.where(cleaner, singular, 1)
    spread = (below**2 - (eta_b * sigma_y / divisor) ** 2).clamp_min(0).sqrt()
    known = (1 - eta_b) * clean + eta_b * seen / divisor + spread * z
    return torch.where(cleaner, known, torch.where(singular > 0, noisier, lost))
