"""Processes, denoiser, guidance and samplers against closed forms."""

import math

import pytest
import torch

from stable_audio_lite.diffusion.denoiser import Guidance, NetworkDenoiser, guide, plan_forwards, restore_deviation
from stable_audio_lite.diffusion.process import CosineProcess, DiscreteProcess, ScheduleConfig, append_dims
from stable_audio_lite.diffusion.samplers import SAMPLERS, ItemNoise, polyexponential_sigmas
from stable_audio_lite.models.unet import UNet, UNetConfig
from stable_audio_lite.nn.attention import Condition

MEAN, STD = 0.7, 0.5  # of the Gaussian data whose denoiser is known exactly


V = CosineProcess("v")


def gaussian_denoiser(x, sigma):
    sigma = append_dims(sigma, x)
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact_flow(x, sigma_from, sigma_to):
    """The probability flow of that data: deviations scale as the standard deviation does."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + sigma_to**2) / (STD**2 + sigma_from**2))


def no_noise() -> torch.Tensor:
    raise AssertionError("an ODE sampler asked for noise")


def tiny_unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(width=8, multipliers=(1, 2), factors=(2,), blocks=(1,), attentions=(1, 1), heads=2, groups=2)
    unet = UNet(config, channels=4, context_width=6, context_tokens=3).requires_grad_(False)
    for parameter in unet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def condition(batch: int) -> Condition:
    torch.manual_seed(2)
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[0, 0] = False
    return Condition(torch.randn(batch, 3, 6), mask)


def test_time_and_sigma_are_inverse():
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    alpha, sigma = V.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(V.time(sigma / alpha), t)


def test_noise_and_v_determine_the_data():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t = V.add_noise(x0, eps, t)
    alpha, sigma = (append_dims(w, x0) for w in V.alpha_sigma(t))
    torch.testing.assert_close(alpha * x_t - sigma * V.target(x0, eps, t), x0)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[-1], eps[-1])


@pytest.mark.parametrize("objective", ["v", "eps", "x0"])
def test_every_objective_gives_the_same_x0(objective):
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    t = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64)
    process = CosineProcess(objective)
    alpha, sigma = process.alpha_sigma(t)
    x_t = process.add_noise(x0, eps, t)
    torch.testing.assert_close(process.to_x0(process.target(x0, eps, t), x_t, sigma / alpha), x0)
    assert torch.equal(process.at(t), t)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="v, eps or x0"):
        CosineProcess("score")  # type: ignore[arg-type]


def test_the_denoiser_scales_its_input_and_recovers_x0():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    sigma = torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64)

    def network(x_t, t, context):
        torch.testing.assert_close(x_t, V.add_noise(x0, eps, t))
        return V.target(x0, eps, t)

    denoiser = NetworkDenoiser(network, V)
    torch.testing.assert_close(denoiser(x0 + append_dims(sigma, x0) * eps, sigma), x0)


def test_sigmas_fall_from_one_end_to_the_other_then_zero():
    sigmas = polyexponential_sigmas(10, 0.03, 500, rho=1.0)
    assert len(sigmas) == 11 and sigmas[-1] == 0
    torch.testing.assert_close(sigmas[[0, -2]], torch.tensor([500, 0.03]), rtol=1e-4, atol=0)
    steps = sigmas[:-1].log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(9), rtol=1e-3, atol=0)
    assert (polyexponential_sigmas(10, 0.03, 500, rho=2.0)[1:-2] < sigmas[1:-2]).all()


@pytest.mark.parametrize(("steps", "low", "high", "rho"), [(0, 0.1, 1, 1), (5, 0, 1, 1), (5, 2, 1, 1), (5, 1, 2, 0)])
def test_bad_sigmas_are_refused(steps, low, high, rho):
    with pytest.raises(ValueError):
        polyexponential_sigmas(steps, low, high, rho)


def test_the_ode_sampler_converges_with_second_order():
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 16, dtype=torch.float64)
    errors: list[float] = []
    for steps in (32, 64, 128):
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        end = SAMPLERS["dpmpp-2m"](gaussian_denoiser, noise * 10, sigmas, noise=no_noise)
        errors.append((end - exact_flow(noise * 10, 10, 0.1)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert min(slopes) >= 1.7 and errors[-1] < 1e-3


def test_ddpm_steps_are_draws_from_the_posterior_of_the_paper():
    """Ho et al. 2020, equations 6 and 7, from betas, for every step of a schedule."""
    made = DiscreteProcess(ScheduleConfig(kind="linear", steps=30), "eps")
    abar = [1.0, *made.abar.tolist()]  # of t = 0 .. 30
    draws = ItemNoise([1, 2], (3, 5))
    x = start = draws().double()
    for t in range(30, 0, -1):
        beta, kept, before = 1 - abar[t] / abar[t - 1], abar[t], abar[t - 1]
        x0 = gaussian_denoiser(x / math.sqrt(kept), torch.full((2,), math.sqrt((1 - kept) / kept)))
        mean = math.sqrt(before) * beta / (1 - kept) * x0 + math.sqrt(1 - beta) * (1 - before) / (1 - kept) * x
        variance = (1 - before) / (1 - kept) * beta
        x = mean + (math.sqrt(variance) * draws() if t > 1 else 0)
    levels = [math.sqrt((1 - kept) / kept) for kept in reversed(abar)]
    noise = ItemNoise([1, 2], (3, 5))
    noise()  # was the start
    sigmas = torch.tensor(levels, dtype=torch.float64)
    end = SAMPLERS["ddpm"](gaussian_denoiser, start / math.sqrt(abar[-1]), sigmas, noise=noise)
    torch.testing.assert_close(end, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["dpmpp-2m-sde", "dpmpp-3m-sde"])
def test_sde_samplers_draw_from_the_data(sampler):
    noise = ItemNoise([11, 12], (1, 20_000))
    first, sigmas = noise(), polyexponential_sigmas(100, 0.01, 100)
    out = SAMPLERS[sampler](gaussian_denoiser, first * sigmas[0], sigmas, noise=noise)
    # Standard errors over 40,000 draws: 0.0025 of the mean, 0.0018 of the standard deviation.
    assert abs(out.mean().item() - MEAN) < 0.01
    assert abs(out.std().item() - STD) < 0.01
    # Fresh noise has replaced the first.
    assert torch.corrcoef(torch.stack((first.flatten(), out.flatten())))[0, 1].abs() < 0.05


def test_noise_belongs_to_the_seed():
    both, one = ItemNoise([3, 4], (2, 5)), ItemNoise([4], (2, 5))
    draws = [both(), both()]
    assert torch.equal(draws[0][1:], one()) and torch.equal(draws[1][1:], one())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0][0], draws[0][1])
    many = ItemNoise(range(50), (1000,))()
    assert abs(many.std().item() - 1) < 0.02 and torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_item_is_the_same_alone_and_in_a_batch(sampler):
    unet, cond, sigmas = tiny_unet(), condition(3), polyexponential_sigmas(6, 0.1, 50)

    def run(chosen: list[int]) -> torch.Tensor:
        noise = ItemNoise([5 + i for i in chosen], (4, 12))
        guidance = Guidance(unet, V, Condition(cond.tokens[chosen], cond.mask[chosen]), scale=3.0, rescale=0.5)
        return SAMPLERS[sampler](guidance, noise() * sigmas[0], sigmas, noise=noise)

    batch = run([0, 1, 2])
    assert torch.isfinite(batch).all()
    for i in range(3):
        assert (run([i])[0] - batch[i]).abs().max() < 1e-4 * batch.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_every_step_is_reported(sampler, steps):
    seen: list[int] = []
    noise, sigmas = ItemNoise([0], (2, 3)), polyexponential_sigmas(steps, 0.1, 10)
    out = SAMPLERS[sampler](gaussian_denoiser, noise(), sigmas, noise=noise, on_step=lambda: seen.append(1))
    assert len(seen) == steps and torch.isfinite(out).all()


def test_rising_sigmas_are_refused():
    with pytest.raises(ValueError, match="falling"):
        SAMPLERS["dpmpp-2m"](gaussian_denoiser, torch.zeros(1, 2), torch.tensor([1.0, 2.0]), noise=no_noise)


def test_guidance_is_the_formula_in_one_forward():
    unet, cond = tiny_unet(), condition(2)
    torch.manual_seed(1)
    x, sigma = torch.randn(2, 4, 8), torch.tensor([0.5, 3.0])
    wanted = NetworkDenoiser(unet, V, unet.context(cond))(x, sigma)
    unwanted = NetworkDenoiser(unet, V, unet.context(unet.null_condition(2)))(x, sigma)
    calls = []
    hook = unet.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    guided = Guidance(unet, V, cond, scale=4.0)(x, sigma)
    torch.testing.assert_close(guided, unwanted + 4 * (wanted - unwanted), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Guidance(unet, V, cond, scale=1.0)(x, sigma), wanted, atol=1e-5, rtol=1e-4)
    hook.remove()
    assert calls == [4, 2]
    # Moving away from what is asked for leads nowhere.
    against_itself = Guidance(unet, V, cond, cond, scale=4.0)(x, sigma)
    torch.testing.assert_close(against_itself, wanted, atol=1e-4, rtol=1e-4)


def test_predictions_can_be_modified_and_learned_from() -> None:
    unet, cond = tiny_unet(), condition(2)
    denoiser, t = NetworkDenoiser(unet, V, unet.context(cond)), torch.tensor([0.3, 0.7])
    x = torch.randn(2, 4, 8, requires_grad=True)
    assert denoiser.predict(x, t).requires_grad
    with torch.no_grad():
        found = denoiser.predict(x, t)
    found += 1
    scale = torch.ones((), requires_grad=True)
    (scale * found).square().sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(found, denoiser.predict(x, t).detach() + 1)


def test_full_rescale_restores_each_frames_deviation():
    torch.manual_seed(0)
    wanted, unwanted = torch.randn(2, 3, 4, 50) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    none = guide(wanted, unwanted, 6.0)
    full = restore_deviation(none, wanted, 1.0)
    torch.testing.assert_close(full.std(1), wanted.std(1))
    torch.testing.assert_close(restore_deviation(none, wanted, 0.25), 0.25 * full + 0.75 * none)


@pytest.mark.parametrize("largest", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 9.0, 20.0])
@pytest.mark.parametrize("negative", [False, True])
def test_forwards_add_up_to_the_guided_prediction(largest: float, scale: float, negative: bool) -> None:
    """Of a network that takes scales exactly; it isn't asked for any below 1 or above its largest."""
    values = {"wanted": 2.0, "negative": -5.0, "null": 0.7}
    forwards = plan_forwards(scale, largest, negative)
    got = sum(f.weight * (values["null"] + f.scale * (values[f.condition] - values["null"])) for f in forwards)
    away = values["negative"] if negative else values["null"]
    assert got == pytest.approx(away + scale * (values["wanted"] - away))
    assert sum(f.weight for f in forwards) == pytest.approx(1)
    assert all(1 <= f.scale <= largest for f in forwards)
    if largest == 1:
        assert len(forwards) == (1 if scale in (0, 1) else 2)


def test_bad_guidance_is_refused():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="rescale"):
        Guidance(unet, V, condition(1), scale=2.0, rescale=1.5)
    with pytest.raises(ValueError, match="same shape"):
        Guidance(unet, V, condition(2), condition(1), scale=2.0)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_a_discrete_schedule_goes_from_data_to_noise(kind: str, steps: int) -> None:
    made = DiscreteProcess(ScheduleConfig(kind=kind, steps=steps), "eps")
    assert made.steps == steps
    assert bool((made.abar.diff() < 0).all())
    assert made.abar[0] > 0.99
    assert made.abar[-1] < 1e-4  # the last step is noise


def test_cosine_steps_are_those_of_the_paper() -> None:
    made = DiscreteProcess(ScheduleConfig(kind="cosine", steps=4000), "eps")
    # Nichol & Dhariwal, equation 17, wherever the largest beta isn't reached.
    f = [math.cos((i / 4000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (0, 1001, 3001)]
    assert made.abar[1000].item() == pytest.approx(f[1] / f[0], rel=1e-9)
    assert made.abar[3000].item() == pytest.approx(f[2] / f[0], rel=1e-9)


def test_linear_steps_are_those_of_ddpm() -> None:
    made = DiscreteProcess(ScheduleConfig(kind="linear", steps=1000), "eps")
    kept = 1.0
    for i in range(1000):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    assert made.abar[-1].item() == pytest.approx(kept, rel=1e-9)


def test_discrete_noise_has_the_schedules_variances() -> None:
    made = DiscreteProcess(ScheduleConfig(kind="linear", steps=50), "eps")
    x0, eps = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    got = made.add_noise(x0, eps, torch.tensor([0, 30]))
    for row, i in enumerate((0, 30)):
        a = made.abar[i].item()
        torch.testing.assert_close(got[row], torch.full((3, 4), math.sqrt(a) + 2 * math.sqrt(1 - a)))


def test_times_of_noise_levels_are_the_steps_that_have_them() -> None:
    made = DiscreteProcess(ScheduleConfig(kind="cosine", steps=400), "eps")
    whole = torch.tensor([0, 17, 399])
    alpha, sigma = made.alpha_sigma(whole)
    torch.testing.assert_close(made.time(sigma / alpha), whole.float(), rtol=1e-3, atol=1e-2)
    assert made.time(torch.tensor([1e-9, 1e9])).tolist() == [0, 399]  # beyond the ends
    assert made.at(torch.tensor([0.0, 0.5, 0.9999, 1.0])).tolist() == [0, 200, 399, 399]


@pytest.mark.parametrize("objective", ["v", "eps", "x0"])
def test_a_network_of_any_objective_and_schedule_becomes_the_same_denoiser(objective: str) -> None:
    made = DiscreteProcess(ScheduleConfig(kind="linear", steps=1000), objective)
    levels = ((1 - made.abar) / made.abar).log() / 2

    def network(x_t, t, context):
        """The exact prediction for the Gaussian data, from times that are steps of `made`, log-linear in between."""
        low = t.long().clamp(max=998)
        flat = levels[low].lerp(levels[low + 1], t.double() - low).exp()
        sigma = append_dims(flat, x_t)
        alpha = (1 + sigma**2).rsqrt()
        x0 = gaussian_denoiser(x_t / alpha, flat)
        eps = (x_t / alpha - x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - alpha * sigma * x0}[objective]

    denoiser = NetworkDenoiser(network, made)
    sigma = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64) * sigma[:, None, None]
    torch.testing.assert_close(denoiser(x, sigma), gaussian_denoiser(x, sigma), rtol=1e-4, atol=1e-4)
