"""Sampling that keeps something: noise levels of strengths, known regions, circles, going back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stable_audio_lite.diffusion.editing import Circular, KnownRegion, resampled, resampled_steps, strength_to_sigma
from stable_audio_lite.diffusion.samplers import SAMPLERS, ItemNoise, polyexponential_sigmas


def test_strength_goes_from_the_lowest_level_to_the_highest() -> None:
    levels = [strength_to_sigma(s / 10, 0.3, 100.0) for s in range(11)]
    assert levels[0] == pytest.approx(0.3) and levels[-1] == pytest.approx(100.0)
    angles = [math.atan(level) for level in levels]
    assert all(b - a == pytest.approx(angles[1] - angles[0]) for a, b in zip(angles, angles[1:], strict=False))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="strength must lie in 0..1"):
            strength_to_sigma(wrong, 0.3, 100.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_data_come_back_and_are_at_the_noise_level_on_the_way(sampler: str) -> None:
    """Whatever the denoiser says of them; for solvers without fresh noise, on the line from their noise."""
    known, mask = torch.randn(2, 3, 8), torch.tensor([True] * 3 + [False] * 3 + [True] * 2)
    seen: list[tuple[Tensor, float]] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.clone(), float(sigma[0])))
        return torch.full_like(x, 5.0)

    inside = KnownRegion(denoiser, known, mask)
    noise, sigmas = ItemNoise([1, 2], (3, 8)), polyexponential_sigmas(6, 0.1, 50.0)
    first = noise()
    out = SAMPLERS[sampler](inside, inside.start(first, 50.0), sigmas, noise=noise)
    torch.testing.assert_close(out[..., mask], known[..., mask])
    torch.testing.assert_close(out[..., ~mask], torch.full((2, 3, 3), 5.0))
    if sampler == "dpmpp-2m":
        for x, sigma in seen:
            torch.testing.assert_close(x[..., mask], (known + sigma * first)[..., mask], rtol=1e-4, atol=1e-3)


def test_a_circle_has_no_place_that_is_special() -> None:
    """A turned input gives a turned estimate, for a denoiser that sees neighbours, at every call's own turn."""

    def blur(x: Tensor, sigma: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (2, 2))  # zeros beyond the ends, as convolutions have
        return sum(padded[..., i : i + x.shape[-1]] for i in range(5)) / 5

    x = torch.randn(1, 2, 13)
    expected = sum(x.roll(shift, -1) for shift in range(-2, 3)) / 5
    circular = Circular(blur, 2, 2)
    for _ in range(5):
        torch.testing.assert_close(circular(x, torch.ones(1)), expected)
    assert not torch.allclose(blur(x, torch.ones(1)), expected)


def test_the_seam_wanders() -> None:
    """Every frame is far from an end in most calls."""
    starts = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        starts.append(int(x[0, 0, 1]))
        return x

    circular, x = Circular(denoiser, 1, 1), torch.arange(40.0).expand(1, 1, 40)
    for _ in range(20):
        assert torch.equal(circular(x, torch.ones(1)), x)
    assert len(set(starts)) > 15


def test_going_back_counts_its_steps_and_ends_where_sampling_does() -> None:
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    sigmas, noise = polyexponential_sigmas(10, 0.1, 50.0), ItemNoise([1], (2, 4))
    calls: list[float] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return torch.zeros_like(x)

    start = noise() * sigmas[0]
    settings = {"noise": noise, "rounds": 3, "jump": 4, "on_step": count}
    out = resampled(SAMPLERS["dpmpp-2m"], denoiser, start, sigmas, **settings)
    assert steps == len(calls) == resampled_steps(10, 3, 4) == 3 * 4 + 3 * 4 + 2
    assert not out.any()
    assert calls[:4] == calls[4:8] == calls[8:12] == pytest.approx(sigmas[:4].tolist())


def test_going_back_keeps_the_noise_level() -> None:
    """Before each repetition, data of variance 0 have the variance that the level says."""
    sigmas, noise = torch.tensor([8.0, 4.0, 1.0, 0.5, 0.0]), ItemNoise([3], (1, 40000))
    seen: dict[float, list[float]] = {}

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.setdefault(float(sigma[0]), []).append(float(x.std()))
        return torch.zeros_like(x)

    resampled(SAMPLERS["dpmpp-2m"], denoiser, noise() * 8, sigmas, noise=noise, rounds=2, jump=2)
    for sigma, deviations in seen.items():
        assert deviations == pytest.approx([sigma] * len(deviations), rel=0.02)
    assert len(seen[8.0]) == len(seen[4.0]) == 2 and len(seen[1.0]) == 1
