"""Seams: a cut is further from its surroundings than any place of a smooth sound; a smooth one is like the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evaluation.metrics.seams import seam_distances
from evaluation.seams import Agreement, Seams, seams_table

RATE = 44100


def glide() -> torch.Tensor:
    time = torch.arange(3 * RATE) / RATE
    tone = sum((2 * math.pi * 200 * k * (time + 0.05 * time**2)).sin() / k for k in range(1, 20))
    return 0.1 * torch.stack((tone, tone)) + 0.001 * torch.randn(
        2, 3 * RATE, generator=torch.Generator().manual_seed(0)
    )


def test_a_click_and_a_change_stand_out_and_a_smooth_place_does_not() -> None:
    smooth, place = glide(), RATE + 77
    at, others = seam_distances(smooth, RATE, [place])
    assert at[0] <= np.percentile(others, 99) and len(others) > 100
    click = smooth.clone()
    click[:, place:] *= -1
    other = torch.cat((smooth[:, :place], smooth.flip(1)[:, place:]), 1)
    for cut in (click, other):
        at, others = seam_distances(cut, RATE, [place])
        assert at[0] > others.max()


def test_a_seam_at_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie 1024 samples within"):
        seam_distances(glide(), RATE, [3 * RATE])


def test_the_table_tells_medians_and_shares() -> None:
    agreement = Agreement(tempo=[True, False], key=[True, True])
    kinds = {"loop": Seams(at=[1.0, 2.0, 9.0], elsewhere=[1.0, 2.0, 3.0, 4.0, 5.0])}
    table = seams_table(kinds, {"continuation": agreement, "halves": agreement})
    assert "2.00 dB (1.00 to 9.00)" in table and "3.00 dB" in table and "4.00 dB" in table
    assert "same tempo in 50% (0% to 100%) of 2, key in 100% (100% to 100%) of 2" in table
