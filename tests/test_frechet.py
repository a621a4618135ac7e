"""Fréchet distance against closed forms and SciPy; tempo, key and width of sounds whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation.metrics.frechet import Gaussian, frechet_distance, frechet_infinity, load_statistics, save_statistics
from evaluation.metrics.levels import width_db
from evaluation.metrics.music import Key, key, tempo
from stable_audio_lite.errors import UserError

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


def test_covariances_of_rank_one_have_a_closed_form() -> None:
    """|u|^2 + |v|^2 - 2 |u . v|, of which what rounding leaves in the other 299 dimensions must not show."""
    generator = torch.Generator().manual_seed(0)
    u, v = 10 * torch.randn(2, 300, generator=generator, dtype=torch.float64)
    mean = torch.zeros(300, dtype=torch.float64)
    found = frechet_distance(Gaussian(mean, u.outer(u)), Gaussian(mean, v.outer(v)))
    assert found == pytest.approx(float(u @ u + v @ v - 2 * abs(u @ v)), rel=1e-10)


def test_the_extrapolated_distance_is_nearer_to_the_truth() -> None:
    """200 samples of one Gaussian against another that is known: the distance of the samples is too large."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    real = Gaussian(torch.full((16,), 0.5, dtype=torch.float64), 4 * torch.eye(16, dtype=torch.float64))
    truth = 16 * 0.25 + 16 * 1.0
    plain = frechet_distance(Gaussian.of(rows), real)
    found = frechet_infinity(lambda n: Gaussian.of(rows[torch.randperm(200, generator=generator)[:n]]), 200, real)
    assert plain > truth and abs(found - truth) < 0.5 * (plain - truth)


def test_the_extrapolation_is_a_line_over_one_by_n() -> None:
    """Where the distance is 3 + 8 / N, infinitely many samples give 3."""
    line = lambda n: Gaussian(torch.tensor([math.sqrt(3 + 8 / n)], dtype=torch.float64), torch.zeros(1, 1).double())  # noqa: E731
    origin = Gaussian(torch.zeros(1).double(), torch.zeros(1, 1).double())
    assert frechet_infinity(line, 60, origin) == pytest.approx(3, abs=1e-9)


@pytest.mark.parametrize("names", [("mu_ref", "sigma_ref"), ("mu", "sigma")])
def test_statistics_of_others_are_read(names: tuple[str, str], tmp_path: Path) -> None:
    one = gaussian(0)
    np.savez(tmp_path / "a.npz", **dict(zip(names, (one.mean.numpy(), one.covariance.numpy()), strict=True)))
    found, settings = load_statistics(tmp_path / "a.npz")
    assert settings is None and frechet_distance(found, one) == pytest.approx(0, abs=1e-9)


def test_statistics_keep_every_digit_and_their_settings(tmp_path: Path) -> None:
    one = gaussian(1)
    save_statistics(tmp_path / "a.npz", one, {"weights": "é", "rate": 1})
    found, settings = load_statistics(tmp_path / "a.npz")
    assert torch.equal(found.mean, one.mean) and torch.equal(found.covariance, one.covariance)
    assert settings == {"weights": "é", "rate": 1}


def test_broken_statistics_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.zeros((2, 2)))
    for name in ("text", "other", "shape", "pickle", "nan", "missing"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            load_statistics(tmp_path / f"{name}.npz")


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
