"""Denoising diffusion restoration models (Kawar et al. 2022, arXiv 2201.11793).

DDRM samples signals that a linear operator and noise may have turned into an observation, given only a denoiser of
clean signals. In the operator's spectral coordinates, each step compares the diffusion's noise with that of the
observation, coordinate by coordinate, and weighs the denoiser and the observation accordingly.
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

    The defaults are those of Saito et al. 2022 (arXiv 2211.04124), who take 50 steps and sigma_y = 1e-3.

    Args:
        denoiser: estimates x0, as for `samplers.SAMPLERS`.
        y: (B, 2, F, T), the observation, of the shape of x0.
        sigmas: (steps + 1,) falling noise levels; end in 0 for a clean result.
        sigma_y: standard deviation of the noise in each real coordinate of y.
        eta: share of fresh noise in coordinates that are lost or noisier in the observation, 0..1.
        eta_b: weight of the observation in coordinates where it is cleaner, 0..1.
        noise: returns fresh standard normal noise of y's shape at each call.
        refine: turns each step's estimate of x0 into a better operator for the rest.
        on_step: called after each step.

    Raises:
        ValueError: sigmas aren't falling, or a setting is out of range.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or sigmas[-1] < 0:
        raise ValueError(f"sigmas must be at least 2 falling noise levels, got {sigmas.tolist()}")
    if not (0 <= eta <= 1 and 0 <= eta_b <= 1 and sigma_y >= 0):
        raise ValueError(f"expected eta and eta_b in 0..1 and sigma_y >= 0, got {eta}, {eta_b} and {sigma_y}")
    levels = sigmas.tolist()
    x = operator.v(_start(operator, y, levels[0], sigma_y, noise().to(y)))
    for sigma, next_sigma in zip(levels, levels[1:], strict=False):
        x0 = denoiser(x, x.new_full((len(x),), sigma))
        if refine is not None:
            operator = refine(x0)
        x = operator.v(_step(operator, y, x, x0, sigma, next_sigma, noise().to(y), sigma_y, eta, eta_b))
        if on_step is not None:
            on_step()
    return x


def _start(operator: Operator, y: Tensor, sigma: float, sigma_y: float, z: Tensor) -> Tensor:
    """Spectral coordinates at the first noise level, p(x_T | y) of Kawar et al., with fresh noise z."""
    singular = operator.singular
    cleaner = (singular * sigma > sigma_y) & (singular > 0)
    divisor = torch.where(cleaner, singular, 1)
    std = (sigma**2 - (sigma_y / divisor) ** 2).clamp_min(0).sqrt()
    return torch.where(cleaner, operator.ut(y) / divisor + std * z, sigma * z)


def _step(
    operator: Operator,
    y: Tensor,
    x: Tensor,
    x0: Tensor,
    sigma: float,
    next_sigma: float,
    z: Tensor,
    sigma_y: float,
    eta: float,
    eta_b: float,
) -> Tensor:
    """Spectral coordinates at the next noise level, p(x_t | x_t+1, y) of Kawar et al., from x at sigma and its x0.

    Each coordinate is one of three: lost (S is 0), noisier in y than in x at the next level, or cleaner.
    """
    singular, clean, observed = operator.singular, operator.vt(x0), operator.ut(y)
    kept = (1 - eta**2) ** 0.5 * next_sigma
    lost = clean + kept * (operator.vt(x) - clean) / sigma + eta * next_sigma * z
    # Undivided by S, which may be tiny: (s / sigma_y) (U^T y / s - x0) = (U^T y - s x0) / sigma_y.
    noisier = clean + kept * (observed - singular * clean) / (sigma_y or 1.0) + eta * next_sigma * z
    is_cleaner = (singular * next_sigma >= sigma_y) & (singular > 0)
    divisor = torch.where(is_cleaner, singular, 1)
    std = (next_sigma**2 - (eta_b * sigma_y / divisor) ** 2).clamp_min(0).sqrt()
    cleaner = (1 - eta_b) * clean + eta_b * observed / divisor + std * z
    return torch.where(is_cleaner, cleaner, torch.where(singular > 0, noisier, lost))
