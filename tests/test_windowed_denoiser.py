"""Denoising by overlapping windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stable_audio_lite.restoration.windowed_denoiser import WindowedDenoiser, window_starts


@pytest.mark.parametrize("total", [8, 9, 13, 14, 20, 100])
def test_windows_cover_everything_and_overlap(total: int) -> None:
    starts = window_starts(total, 8, 3)
    assert starts[0] == 0 and starts[-1] == total - 8
    assert all(0 < b - a <= 5 for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("total", [8, 19, 50])
def test_a_pointwise_denoiser_is_the_same_by_windows(total: int) -> None:
    x, sigma = torch.randn(3, 2, 4, total), torch.tensor([1.0, 2.0, 3.0])

    def shrink(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1))

    torch.testing.assert_close(WindowedDenoiser(shrink, 8, 3)(x, sigma), shrink(x, sigma))


def test_windows_that_disagree_are_faded_into_each_other() -> None:
    calls: list[int] = []

    def disagree(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.full_like(x, float(len(calls) % 2))  # each window says something else

    out = WindowedDenoiser(disagree, 32, 16, batch=1)(torch.zeros(1, 2, 4, 80), torch.ones(1))[0, 0, 0]
    assert len(calls) == 4 and out.min() == 0 and out.max() == 1
    assert out.diff().abs().max() <= 1 / 16 + 1e-6


def test_no_more_windows_than_the_batch_are_denoised_at_once() -> None:
    sizes: list[int] = []

    def count(x: Tensor, sigma: Tensor) -> Tensor:
        sizes.append(len(x))
        assert x.shape[1:] == (2, 4, 8) and len(sigma) == len(x)
        return x

    WindowedDenoiser(count, 8, 4, batch=3)(torch.zeros(2, 2, 4, 28), torch.ones(2))
    assert sum(sizes) == 12 and max(sizes) == 3


def test_bad_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        WindowedDenoiser(lambda x, s: x, 8, 8)
    with pytest.raises(ValueError, match="pad"):
        window_starts(7, 8, 2)
