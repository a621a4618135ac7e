"""DDRM with the exact denoiser of Gaussian data in place of a network, whose posterior is known.

What DDRM's samples are, with singular value s and the observation's noise in units of the signal tau = sigma_y / s:

- s = 0: with eta = 0 a denoising diffusion implicit model, so exact as steps become many, where the prior doesn't tie
  what is lost to what is seen; where it does, the mean becomes exact as steps become many, for eta > 0.
- sigma_t >= tau with eta_b = 1: x_t = ybar + sqrt(sigma_t^2 - tau^2) z is exact at every level, whatever the prior.
- sigma_t < tau: not exact, for each step forgets x_t+1 but for its x0. Noise levels that stop above tau never go there,
  and with the last one at sqrt(2) tau the samples keep the posterior's spread but for terms of tau^2 / prior variance.
  Levels below it are checked against the moments that the paper's transitions have for linear denoisers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stable_audio_lite.diffusion.samplers import Denoiser, ItemNoise, polyexponential_sigmas
from stable_audio_lite.restoration.ddrm import ddrm
from stable_audio_lite.restoration.operators import Convolution, Operator, frames_beside_gaps

BINS, FRAMES, DRAWS = 2, 4, 4000
SHAPE = (2, BINS, FRAMES)
SIZE = math.prod(SHAPE)
ERRORS = 5  # standard errors that a mean or a deviation may be off


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def standard(seed: int) -> Callable[[], Tensor]:
    source = generator(seed)
    return lambda: torch.randn(DRAWS, *SHAPE, dtype=torch.float64, generator=source)


def room(first: complex, second: complex) -> Convolution:
    return Convolution(torch.tensor([[first, second]], dtype=torch.complex128).expand(BINS, 2), FRAMES)


OPERATORS: dict[str, Operator] = {
    "gap": Operator(frames_beside_gaps(FRAMES, [(9, 10)], hop=8, window=16).float()[None]),
    "band": Operator((torch.arange(BINS)[:, None] < 1).float()),
    "room": room(1, 0.5j),
    "room with a zero": room(1, -1),
    "room with a small value": room(1, -0.98),
}


class SpectralPrior:
    """Independent Gaussians in an operator's spectral coordinates, and their denoiser."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.mean = torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator(1))
        self.variance = 0.5 + torch.rand(1, *SHAPE, dtype=torch.float64, generator=generator(2))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1) ** 2
        seen = self.operator.vt(x)
        return self.operator.v((self.variance * seen + level * self.mean) / (self.variance + level))

    def draw(self) -> Tensor:
        z = torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator(3))
        return self.operator.v(self.mean + self.variance.sqrt() * z)


class DensePrior:
    """A Gaussian whose coordinates are all tied to each other, and its denoiser."""

    def __init__(self) -> None:
        basis = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator(4))).Q
        self.covariance = basis @ torch.diag(torch.linspace(0.3, 2, SIZE, dtype=torch.float64)) @ basis.T
        self.mean = torch.randn(SIZE, dtype=torch.float64, generator=generator(5))

    def gain(self, sigma: float) -> Tensor:
        return self.covariance @ torch.linalg.inv(self.covariance + sigma**2 * torch.eye(SIZE, dtype=torch.float64))

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (self.mean + (x.flatten(1) - self.mean) @ self.gain(float(sigma[0])).T).reshape(x.shape)

    def draw(self) -> Tensor:
        z = torch.randn(SIZE, dtype=torch.float64, generator=generator(6))
        return (self.mean + torch.linalg.cholesky(self.covariance) @ z).reshape(1, *SHAPE)


def assert_moments(samples: Tensor, mean: Tensor, deviation: Tensor, bias: float = 0.0) -> None:
    """Means and standard deviations over the samples agree to their standard errors and `bias`."""
    count = len(samples)
    wrong = (samples.mean(0) - mean).abs()
    assert bool((wrong <= ERRORS * deviation / math.sqrt(count) + bias + 1e-6).all()), float(wrong.max())
    wrong = (samples.std(0) - deviation).abs()
    assert bool((wrong <= ERRORS * deviation / math.sqrt(2 * count) + bias + 1e-6).all()), float(wrong.max())


def sample(
    denoise: Denoiser, operator: Operator, y: Tensor, sigmas: Tensor, sigma_y: float, eta: float, eta_b: float
) -> Tensor:
    y = y.expand(DRAWS, *SHAPE)
    return ddrm(denoise, operator, y, sigmas.double(), sigma_y=sigma_y, eta=eta, eta_b=eta_b, noise=standard(9))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_without_noise_samples_follow_the_posterior(operator: Operator) -> None:
    prior = SpectralPrior(operator)
    truth = prior.draw()
    y = operator.forward(truth)
    sigmas = polyexponential_sigmas(150, 0.01, 100)
    samples = sample(prior.denoise, operator, y, sigmas, 0.0, eta=0.0, eta_b=1.0)
    lost = (operator.singular == 0).expand(1, *SHAPE)[0]
    mean = torch.where(lost, prior.mean[0], operator.vt(truth)[0])
    deviation = torch.where(lost, prior.variance[0].sqrt(), 0.0)
    assert_moments(operator.vt(samples), mean, deviation, bias=0.01)
    torch.testing.assert_close(operator.forward(samples), y.expand_as(samples), atol=1e-6, rtol=0)


def test_with_noise_samples_follow_the_posterior() -> None:
    operator, sigma_y = Operator(torch.ones(1, 1)), 0.03
    prior = SpectralPrior(operator)
    y = prior.draw() + sigma_y * torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator(7))
    sigmas = polyexponential_sigmas(50, math.sqrt(2) * sigma_y, 100)
    samples = sample(prior.denoise, operator, y, sigmas, sigma_y, eta=0.8, eta_b=1.0)
    share = prior.variance / (prior.variance + sigma_y**2)
    mean, deviation = prior.mean + share * (y - prior.mean), share.sqrt() * sigma_y
    small = sigma_y**2 / float(prior.variance.min())
    assert_moments(samples, mean[0], deviation[0], bias=2 * small * float((y - prior.mean).abs().max()))


@pytest.mark.parametrize("operator", [OPERATORS["room"], OPERATORS["room with a small value"]])
def test_a_level_above_the_observations_noise_is_exact(operator: Operator) -> None:
    prior, sigma_y, last = SpectralPrior(operator), 0.05, 3.0
    y = operator.forward(prior.draw())
    sigmas = torch.logspace(2, math.log10(last), 8)
    samples = sample(prior.denoise, operator, y, sigmas, sigma_y, eta=0.8, eta_b=1.0)
    tau = sigma_y / operator.singular
    assert float(tau.max()) < last
    mean = (operator.ut(y) / operator.singular)[0]
    assert_moments(operator.vt(samples), mean, (last**2 - tau**2).sqrt().expand(BINS, FRAMES))


def dense(operator: Operator) -> Tensor:
    """The operator as a matrix (SIZE, SIZE)."""
    basis = torch.eye(SIZE, dtype=torch.float64).reshape(SIZE, *SHAPE)
    return operator.forward(basis).reshape(SIZE, SIZE).T


def transition(s: float, level: float, below: float, sigma_y: float, eta: float, eta_b: float) -> tuple[float, ...]:
    """Weights of (x0, x_t+1, U^T y, z) in one spectral coordinate of x_t, as Kawar et al. state them."""
    rest = math.sqrt(1 - eta**2)
    if s < 1e-6:
        return 1 - rest * below / level, rest * below / level, 0.0, eta * below
    if below < sigma_y / s:
        return 1 - rest * below * s / sigma_y, 0.0, rest * below / sigma_y, eta * below
    return 1 - eta_b, 0.0, eta_b / s, math.sqrt(below**2 - (sigma_y * eta_b / s) ** 2)


def moments(
    prior: DensePrior, operator: Operator, y: Tensor, sigmas: Tensor, sigma_y: float, eta: float, eta_b: float
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of DDRM's samples: every step of it is linear in x, y and z."""
    u, values, vt = torch.linalg.svd(dense(operator))
    seen, levels = u.T @ y.flatten(), sigmas.tolist()
    cleaner = [s >= 1e-6 and s * levels[0] > sigma_y for s in values.tolist()]
    mean = torch.stack([c / s if ok else 0 * c for c, s, ok in zip(seen, values, cleaner, strict=True)])
    spread = [
        levels[0] ** 2 - (sigma_y / s) ** 2 * ok if ok else levels[0] ** 2
        for s, ok in zip(values.tolist(), cleaner, strict=True)
    ]
    covariance = torch.diag(torch.tensor(spread, dtype=torch.float64))
    centre = vt @ prior.mean
    for level, below in zip(levels, levels[1:], strict=False):
        rows = [transition(s, level, below, sigma_y, eta, eta_b) for s in values.tolist()]
        of_clean, of_x, of_y, of_z = torch.tensor(rows, dtype=torch.float64).T
        gain = vt @ prior.gain(level) @ vt.T
        mean_clean = centre + gain @ (mean - centre)
        step = of_clean[:, None] * gain + torch.diag(of_x)
        mean = of_clean * mean_clean + of_x * mean + of_y * seen
        covariance = step @ covariance @ step.T + torch.diag(of_z**2)
    return vt.T @ mean, vt.T @ covariance @ vt


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize(("sigma_y", "eta", "eta_b"), [(0.3, 0.8, 0.8), (0.05, 0.3, 1.0), (0.0, 1.0, 0.5)])
def test_samples_have_the_moments_of_the_papers_transitions(
    operator: Operator, sigma_y: float, eta: float, eta_b: float
) -> None:
    prior = DensePrior()
    y = operator.forward(prior.draw()) + sigma_y * torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator(8))
    # Coordinates of every kind: lost, seen better than the first level, than a middle one, than none but the last.
    sigmas = torch.tensor([10, 3, 1, 0.5, 0.2, 0.1])
    samples = sample(prior.denoise, operator, y, sigmas, sigma_y, eta, eta_b).flatten(1)
    mean, covariance = moments(prior, operator, y, sigmas, sigma_y, eta, eta_b)
    assert_moments(samples, mean, covariance.diagonal().sqrt())
    error = (samples.T.cov() - covariance).abs()
    scale = covariance.diagonal().sqrt()
    assert bool((error <= ERRORS * 1.5 * scale[:, None] * scale / math.sqrt(DRAWS)).all())


@pytest.mark.parametrize("operator", [OPERATORS["gap"], OPERATORS["room with a zero"]])
def test_what_is_lost_is_inferred_from_what_is_seen(operator: Operator) -> None:
    prior = DensePrior()
    y, matrix = operator.forward(prior.draw()), dense(operator)
    gain = prior.covariance @ matrix.T @ torch.linalg.pinv(matrix @ prior.covariance @ matrix.T, rtol=1e-9)
    mean = prior.mean + gain @ (y.flatten() - matrix @ prior.mean)
    _, values, vt = torch.linalg.svd(matrix)
    lost = vt[values < 1e-6]

    def error(steps: int) -> float:
        # Linear steps without noise lead to the mean of the samples.
        sigmas = polyexponential_sigmas(steps, 0.01, 30).double()
        quiet = torch.zeros(1, *SHAPE, dtype=torch.float64)
        found = ddrm(prior.denoise, operator, y, sigmas, sigma_y=0.0, eta=0.9, eta_b=1.0, noise=lambda: quiet)
        return float((lost @ (found.flatten() - mean)).norm() / (lost @ (mean - prior.mean)).norm())

    errors = [error(20), error(200), error(1000)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1] and errors[2] < 0.05, errors


@pytest.mark.parametrize("settings", [{"eta": 1.1}, {"eta_b": -0.1}, {"sigma_y": -1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="eta"):
        ddrm(
            lambda x, s: x,
            Operator(torch.ones(1, 1)),
            torch.zeros(1, *SHAPE),
            torch.tensor([1.0, 0.0]),
            noise=lambda: torch.zeros(1),
            **{"sigma_y": 0.1, **settings},
        )


def test_rising_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="falling"):
        ddrm(
            lambda x, s: x,
            Operator(torch.ones(1, 1)),
            torch.zeros(1, *SHAPE),
            torch.tensor([1.0, 2.0]),
            sigma_y=0.1,
            noise=lambda: torch.zeros(1),
        )


def test_each_step_is_reported_and_may_better_the_operator() -> None:
    prior, estimates, steps = SpectralPrior(Operator(torch.ones(1, 1))), [], []
    y = prior.draw()
    lost = Operator(torch.zeros(1, 1))

    def refine(estimate: Tensor) -> Operator:
        estimates.append(estimate)
        return Operator(torch.ones(1, 1))

    sigmas = polyexponential_sigmas(4, 0.01, 10)
    noise = ItemNoise([3], SHAPE)
    on_step: Callable[[], None] = lambda: steps.append(1)  # noqa: E731
    out = ddrm(prior.denoise, lost, y, sigmas, sigma_y=0.0, eta_b=1.0, noise=noise, refine=refine, on_step=on_step)
    assert len(estimates) == len(steps) == 4
    torch.testing.assert_close(out, y)


def test_an_item_is_the_same_alone_and_in_a_batch() -> None:
    prior, operator = SpectralPrior(OPERATORS["room"]), OPERATORS["room"]
    y = torch.cat((prior.draw(), -prior.draw())).float()
    sigmas = polyexponential_sigmas(5, 0.01, 10)

    def run(chosen: list[int]) -> Tensor:
        noise = ItemNoise([4 + i for i in chosen], SHAPE)
        return ddrm(prior.denoise, operator, y[chosen], sigmas, sigma_y=0.1, noise=noise)

    torch.testing.assert_close(run([1])[0], run([0, 1])[1])
