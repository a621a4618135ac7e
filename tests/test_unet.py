"""The U-Net: size, conditioning, dtypes, and that items and padding do not leak."""

import dataclasses
import math

import pytest
import torch

from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.diffusion.process import CosineProcess
from stable_audio_lite.models.conditioner import Conditioner, TimingConfig
from stable_audio_lite.models.unet import PULSE_HARMONICS, PULSE_PERIOD, Pulse, UNet, UNetConfig
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.nn.frames import Conv, GroupNorm, Upsample
from training.denoising import Conditioned

TINY = UNetConfig(
    width=16,
    multipliers=(1, 2, 2),
    factors=(2, 4),
    blocks=(1, 2),
    attentions=(1, 0, 1),
    heads=4,
    feed_forward=2,
    groups=4,
)


@pytest.fixture(params=[False, True], ids=["plain", "pooled context and pulse"])
def unet(request: pytest.FixtureRequest) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, pooled_context=request.param, pulse=request.param)
    model = UNet(config, channels=6, context_width=12, context_tokens=5)
    with torch.no_grad():
        for parameter in model.parameters():
            # Layers that start at zero would hide what is tested here.
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 3, frames: int = 32) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    torch.manual_seed(1)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 2:] = False
    return torch.randn(batch, 6, frames), torch.rand(batch), Condition(torch.randn(batch, 5, 12), mask)


def test_paper_size_has_exactly_the_published_parameters():
    with torch.device("meta"):
        model = UNet(UNetConfig(), channels=64, context_width=768, context_tokens=79)
    assert sum(p.numel() for p in model.parameters()) == 906_679_744
    assert model.null.numel() == 60_672
    assert {name for name, _ in model.named_buffers()} == {"latent_mean", "latent_std"}


def test_a_new_network_predicts_nothing_yet_and_its_null_gets_gradients():
    torch.manual_seed(0)
    model = UNet(TINY, channels=6, context_width=12, context_tokens=5)
    x, t, _ = inputs()
    assert model(x, t, model.context(model.null_condition(3))).abs().max() == 0


def test_one_optimiser_step_reaches_every_parameter(unet):
    x, t, cond = inputs()
    tokens = torch.cat((cond.tokens[:2], unet.null[None]))
    unet(x, t, unet.context(Condition(tokens, cond.mask))).square().sum().backward()
    silent = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_pooled_context_and_pulse_start_as_nothing_and_then_say_what_they_should():
    """FiLM then knows the mean of the tokens that aren't masked; silence at every frame is no longer the same."""
    torch.manual_seed(0)
    plain = UNet(dataclasses.replace(TINY, attentions=(0, 0, 0)), channels=6, context_width=12, context_tokens=5)
    richer = dataclasses.replace(plain.config, pooled_context=True, pulse=True)
    unet = UNet(richer, channels=6, context_width=12, context_tokens=5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    missing = unet.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"pooled", "pulse"}
    x, t, cond = inputs(frames=64)
    torch.testing.assert_close(unet(x, t, unet.context(cond)), plain(x, t, plain.context(cond)))
    with torch.no_grad():
        torch.nn.init.normal_(unet.pooled.weight)
    swapped = Condition(cond.tokens.flip(1), cond.mask.flip(1))
    torch.testing.assert_close(unet.context(swapped).pooled, unet.context(cond).pooled)
    torch.testing.assert_close(unet.context(cond).pooled[0], unet.pooled(cond.tokens[0, :2].mean(0)))
    other = Condition(cond.tokens + 1, cond.mask)
    assert (unet(x, t, unet.context(other)) - unet(x, t, unet.context(cond))).abs().amax((1, 2)).min() > 1e-3
    still, context = torch.zeros(3, 6, 512), unet.context(cond)

    def drift() -> torch.Tensor:
        """From frames far from the ends to those a product of the strides later."""
        out = unet(still, t, context)
        return (out[..., 256:264] - out[..., 248:256]).abs().amax((1, 2))

    assert drift().max() < 1e-4
    with torch.no_grad():
        torch.nn.init.normal_(unet.pulse.to_hidden.weight)
    assert drift().min() > 1e-2


def test_a_pulse_is_a_fourier_series_over_the_frames_of_the_piece():
    pulse = Pulse(channels=6, hidden=8, time_width=4, context_width=12)
    gates = torch.zeros(2, PULSE_HARMONICS)
    gates[0, 3], gates[1, PULSE_HARMONICS - 1] = 2.0, 1.0
    series = pulse.series(PULSE_PERIOD + 16, gates)
    sines, cosines = series.double().chunk(2, -1)
    frames = torch.arange(PULSE_PERIOD + 16, dtype=torch.float64) * 2 * math.pi / PULSE_PERIOD
    torch.testing.assert_close(sines[0, :, 3], 2 * (4 * frames).sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(cosines[1, :, -1], (PULSE_HARMONICS * frames).cos(), atol=1e-5, rtol=0)
    assert sines[0].count_nonzero(0).ne(0).sum() == 1
    assert torch.equal(pulse.series(40, gates), series[:, :40])
    assert torch.equal(pulse.series(40, gates, torch.zeros(2)), series[:, :40])
    later = pulse.series(40, gates, torch.tensor([7.0, 300.0]))
    torch.testing.assert_close(later, torch.stack((series[0, 7:47], series[1, 300:340])), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (2, 1), (5, 2)])
def test_large_convolutions_are_the_same_with_and_without_gradients(kernel, stride):
    layer = Conv(1024, 1024, kernel=kernel, stride=stride)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 256, 1024)
    stacked = layer(x)
    with torch.no_grad():
        assert layer._suits_image(x) == ((kernel, stride) == (3, 1))
        out = layer(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out, stacked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("unet", [True], indirect=True, ids=["pulse"])
def test_the_pulse_of_a_later_window_goes_on_from_the_earlier_one(unet):
    """In what the network expects of the data, and with guidance in both halves."""
    x, t, cond = inputs()
    start = torch.full((3,), 8.0)
    whole, later = (unet.expected(frames, unet.context(cond, None, s)) for frames, s in ((32, None), (24, start)))
    shift = (whole[..., 8:] - later).detach()  # each is less its own mean over T
    assert shift.std(-1).max() < 1e-4 and whole.std() > 1e-2
    process = CosineProcess("v")
    with torch.no_grad():
        both = Guidance(unet, process, cond, scale=3.0, start=start).predict(x, t)
        wanted, unwanted = (unet(x, t, unet.context(c, None, start)) for c in (cond, unet.null_condition(3)))
        torch.testing.assert_close(both, unwanted + 3 * (wanted - unwanted), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(wanted, unet(x, t, unet.context(cond)), atol=1e-3)


def test_masked_tokens_do_not_matter_and_others_do(unet):
    x, t, cond = inputs()
    reference = unet(x, t, unet.context(cond))
    tokens = cond.tokens.clone()
    tokens[0, 2:] = 100.0
    assert torch.equal(unet(x, t, unet.context(Condition(tokens, cond.mask))), reference)
    tokens[1, 2:] = 100.0
    changed = (unet(x, t, unet.context(Condition(tokens, cond.mask))) - reference).abs().amax((1, 2))
    assert changed[1] > 1e-3 and changed[0] == 0 and changed[2] == 0


def test_masking_equals_leaving_the_tokens_out(unet):
    x, t, cond = inputs()
    short = Condition(cond.tokens[:1, :2], cond.mask[:1, :2])
    expected = unet(x[:1], t[:1], unet.context(short))
    assert unet.context(short).mask is None
    torch.testing.assert_close(unet(x, t, unet.context(cond))[:1], expected, atol=1e-5, rtol=1e-4)


def test_a_context_serves_every_step(unet):
    x, t, cond = inputs()
    context = unet.context(cond)
    unet(x, t, context)
    assert torch.equal(unet(2 * x, t / 2, context), unet(2 * x, t / 2, unet.context(cond)))


def test_an_item_comes_out_the_same_alone_and_in_a_batch(unet):
    x, t, cond = inputs()
    together = unet(x, t, unet.context(cond))
    for i in range(3):
        alone = Condition(cond.tokens[i : i + 1], cond.mask[i : i + 1])
        one = unet(x[i : i + 1], t[i : i + 1], unet.context(alone))
        torch.testing.assert_close(one[0], together[i], atol=1e-5, rtol=1e-4)


def test_time_and_latents_matter(unet):
    x, t, cond = inputs()
    context = unet.context(cond)
    reference = unet(x, t, context)
    assert (unet(x, t + 0.3, context) - reference).abs().amax((1, 2)).min() > 1e-3
    assert (unet(-x, t, context) - reference).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("frames", [1, 8, 13, 100])
def test_any_length(unet, frames):
    x, t, cond = inputs(frames=frames)
    assert unet(x, t, unet.context(cond)).shape == x.shape


def test_bfloat16_weights_run_and_stay_close(unet):
    x, t, cond = inputs()
    reference = unet(x, t, unet.context(cond))
    unet.to(torch.bfloat16)
    out = unet(x, t, unet.context(cond))
    assert out.dtype == torch.float32
    assert (out - reference).std() < 0.05 * reference.std()
    assert unet(x.bfloat16(), t.bfloat16(), unet.context(cond)).dtype == torch.bfloat16


def test_runs_under_autocast(unet):
    x, t, cond = inputs()
    reference = unet(x, t, unet.context(cond))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unet(x, t, unet.context(cond))
    assert out.dtype == torch.float32
    assert (out - reference).std() < 0.05 * reference.std()
    out.square().mean().backward()


def test_checkpointing_changes_no_gradient(unet):
    x, t, cond = inputs()
    gradients = []
    for checkpointing in (False, True):
        unet.gradient_checkpointing = checkpointing
        unet.zero_grad()
        unet(x, t, unet.context(cond)).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_compiles_without_graph_breaks(unet):
    x, t, cond = inputs()
    context = unet.context(cond)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, context), unet(x, t, context))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 2), (9, 4)])
def test_conv_equals_torch_convolution(kernel, stride):
    torch.manual_seed(0)
    conv, x = Conv(6, 10, kernel=kernel, stride=stride), torch.randn(2, 16, 6)
    weight = conv.weight.view(10, kernel, 6).transpose(1, 2)
    padding = kernel - stride
    padded = torch.nn.functional.pad(x.transpose(1, 2), (padding - padding // 2, padding // 2))
    expected = torch.nn.functional.conv1d(padded, weight, conv.bias, stride=stride).transpose(1, 2)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [2, 4])
def test_upsample_equals_torch_transposed_convolution(factor):
    torch.manual_seed(0)
    up, x = Upsample(6, 10, factor), torch.randn(2, 7, 6)
    weight = up.weight.view(2 * factor, 10, 6).permute(2, 1, 0)
    expected = torch.nn.functional.conv_transpose1d(
        x.transpose(1, 2), weight, up.bias, stride=factor, padding=factor // 2
    )
    torch.testing.assert_close(up(x), expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_group_norm_equals_torch_group_norm():
    torch.manual_seed(0)
    norm, x = GroupNorm(4, 16), 3 + torch.randn(2, 9, 16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = torch.nn.functional.group_norm(x.transpose(1, 2), 4, norm.weight, norm.bias).transpose(1, 2)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": (2,)}, "factors needs 2 entries"),
        ({"attentions": (1, 1)}, "attentions needs 3 entries"),
        ({"heads": 3}, "divisible"),
        ({"groups": 5}, "divisible"),
        ({"blocks": (0, 1)}, "blocks must be at least 1"),
        ({"attentions": (1, -1, 1)}, "attentions must be at least 0"),
        ({"multipliers": (1,)}, "at least 2 entries"),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_inputs_are_refused(unet):
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"\(B, 6, T\)"):
        unet(x[:, :5], t, unet.context(cond))
    with pytest.raises(ValueError, match="12"):
        unet.context(Condition(cond.tokens[..., :7], cond.mask))


def test_training_tells_the_network_where_a_window_begins(unet):
    """In frames of the piece, as generation does."""
    model = Conditioned(Conditioner(TimingConfig(max_seconds=20), 12), unet, frame_rate=40.0)
    x, t, cond = inputs()
    text = Condition(cond.tokens[:, :3], cond.mask[:, :3])
    timing, dropped = (torch.tensor([0.0, 2.0, 5.5]), torch.full((3,), 9.0)), torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        condition = model.condition(text, timing, dropped)
        there = unet(x, t, unet.context(condition, None, torch.tensor([0.0, 80.0, 220.0])))
        at_once = unet(x, t, unet.context(condition))
        assert torch.equal(model(x, t, text, timing, dropped)[0], there)
    assert torch.equal(there[0], at_once[0]) and torch.equal(there, at_once) == (unet.pulse is None)
