"""Fréchet distance against closed forms and SciPy; tempo, key and width of sounds whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation.frechet import Gaussian, frechet_distance
from evaluation.music import Key, key, tempo, width_db

RATE = 44100


def gaussian(seed: int, dimensions: int = 6) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(dimensions, generator=generator, dtype=torch.float64), factor @ factor.T)


def test_equal_gaussians_have_no_distance_and_order_does_not_matter() -> None:
    one, other = gaussian(0), gaussian(1)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-10)


def test_gaussians_that_commute_have_a_closed_form() -> None:
    """Of diagonal covariances: the squared distance of the means and of the deviations."""
    a, b = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([4.0, 4.0, 0.0], dtype=torch.float64)
    one = Gaussian(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), a.diag())
    other = Gaussian(torch.zeros(3, dtype=torch.float64), b.diag())
    assert frechet_distance(one, other) == pytest.approx(5 + float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-10)


def test_scipy_agrees() -> None:
    one, other = gaussian(2), gaussian(3)
    product = scipy.linalg.sqrtm((one.covariance @ other.covariance).numpy()).real
    expected = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace()
    assert frechet_distance(one, other) == pytest.approx(float(expected) - 2 * np.trace(product), rel=1e-8)


def test_fewer_samples_than_dimensions_are_handled() -> None:
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(Gaussian.of(rows), Gaussian.of(rows)) == pytest.approx(0, abs=1e-9)
    moved = frechet_distance(Gaussian.of(rows), Gaussian.of(rows + 3))
    assert moved == pytest.approx(9 * 20, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian.of(rows[:1])


def clicks(bpm: float, seconds: float = 8.0) -> torch.Tensor:
    """A short burst on every beat."""
    audio = torch.zeros(2, round(seconds * RATE))
    burst = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0, 2000)
    for beat in range(int(seconds * bpm / 60)):
        start = round(beat * 60 / bpm * RATE)
        audio[:, start : start + 2000] = burst[: audio.shape[1] - start]
    return 0.3 * audio


@pytest.mark.parametrize("bpm", [82, 97, 120, 147])
def test_tempo_of_a_metronome(bpm: int) -> None:
    assert tempo(clicks(bpm), RATE) == pytest.approx(bpm, rel=0.02)


def test_silence_has_neither_tempo_nor_key() -> None:
    assert tempo(torch.zeros(2, RATE), RATE) is None and key(torch.zeros(2, RATE), RATE) is None


@pytest.mark.parametrize(
    ("degrees", "mode"), [((0, 4, 7, 5, 9, 0, 7, 11, 2, 0), "major"), ((0, 3, 7, 5, 8, 0), "minor")]
)
@pytest.mark.parametrize("tonic", [0, 4, 9])
def test_key_of_a_melody(degrees: tuple[int, ...], mode: str, tonic: int) -> None:
    time = torch.arange(RATE // 2) / RATE
    notes = [
        sum(torch.sin(2 * math.pi * n * 261.63 * 2 ** ((tonic + d) / 12) * time) / n for n in (1, 2, 3))
        for d in degrees
    ]
    names = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    assert key(0.1 * torch.cat(notes).expand(2, -1), RATE) == Key(names[tonic], mode)


def test_width_is_the_side_beside_the_middle() -> None:
    left, right = torch.randn(2, 1, RATE, generator=torch.Generator().manual_seed(0))
    assert width_db(torch.cat((left, left))) == -100
    assert width_db(torch.cat((left, right))) == pytest.approx(0, abs=0.2)
    assert width_db(torch.cat((left + 0.1 * right, left - 0.1 * right))) == pytest.approx(-20, abs=0.2)
