"""Sampling that keeps something: a sound's outline, what lies around a gap, or the join of a loop's ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stable_audio_lite.diffusion.samplers import Denoiser, Sampler

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, never come near one another


def strength_to_sigma(strength: float, sigma_min: float, sigma_max: float) -> float:
    """Noise level from which SDEdit denoises (Meng et al. 2022, arXiv 2108.01073).

    Levels lie evenly in atan(sigma), the time of the cosine process: strength 0 is `sigma_min`, 1 `sigma_max`.

    Raises:
        ValueError: strength is outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, got {strength}")
    low, high = math.atan(sigma_min), math.atan(sigma_max)
    return math.tan(low + strength * (high - low))


class KnownRegion:
    """A denoiser whose estimates are right where data are known.

    A sampler then moves those data along the straight line from noise to what they are, so they are at the noise level
    of the rest at each step, as RePaint puts them back (Lugmayr et al. 2022, arXiv 2201.09865, equation 8). `known` are
    (B, ...) data, and `mask` is True where they are, bool of their last axis or of their whole shape.
    """

    def __init__(self, denoiser: Denoiser, known: Tensor, mask: Tensor) -> None:
        self.denoiser, self.known, self.mask = denoiser, known, mask

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, ...) = x0 + sigma eps, sigma (B,)."""
        return torch.where(self.mask, self.known.to(x), self.denoiser(x, sigma))

    def start(self, noise: Tensor, sigma: float) -> Tensor:
        """Noisy data to sample from: the known ones at level sigma, elsewhere noise alone."""
        return torch.where(self.mask, self.known.to(noise), 0.0) + sigma * noise


class Circular:
    """A denoiser of sounds whose end meets their beginning.

    Data (B, ..., T) are turned by another number of frames at each call, so that no frame is always at an end, and go
    on round the circle, `before` and `after` frames on each side, which the `denoiser` takes as well.
    """

    def __init__(self, denoiser: Denoiser, before: int, after: int) -> None:
        self.denoiser, self.before, self.after, self.calls = denoiser, before, after, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x0 from x (B, ..., T) = x0 + sigma eps, sigma (B,)."""
        frames = x.shape[-1]
        turn = round(self.calls * _GOLDEN % 1 * frames)
        self.calls += 1
        places = (torch.arange(-self.before, frames + self.after, device=x.device) + turn) % frames
        estimate = self.denoiser(x[..., places], sigma)[..., self.before : self.before + frames]
        return estimate.roll(turn, -1)


def resampled(
    solve: Sampler,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Callable[[], Tensor],
    rounds: int,
    jump: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Sample going back at times: each `jump` steps are done `rounds` times, with new noise (RePaint, section 4.2).

    Data that are generated meet the known ones more than once then, and fit them better. The last `jump` steps are done
    once. The arguments are those of `Sampler`; it takes `resampled_steps` network calls.
    """
    for first, last, repeats in _segments(len(sigmas) - 1, rounds, jump):
        for repeat in range(repeats):
            if repeat:
                x = x + (sigmas[first] ** 2 - sigmas[last] ** 2).sqrt().to(x) * noise().to(x)
            x = solve(denoiser, x, sigmas[first : last + 1], noise=noise, on_step=on_step)
    return x


def resampled_steps(steps: int, rounds: int, jump: int) -> int:
    """Steps that `resampled` takes for `steps` noise levels."""
    return sum((last - first) * repeats for first, last, repeats in _segments(steps, rounds, jump))


def _segments(steps: int, rounds: int, jump: int) -> Iterator[tuple[int, int, int]]:
    for first in range(0, steps, jump):
        last = min(first + jump, steps)
        yield first, last, 1 if last == steps else rounds
