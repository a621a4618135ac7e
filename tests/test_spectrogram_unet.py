"""The spectrogram U-Net: sizes, what each layer may see, dtypes, refusals, and that it learns."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from stable_audio_lite.models.spectrogram_unet import (
    TDF,
    Attention2d,
    GroupNorm2d,
    ResidualBlock2d,
    SpectrogramUNet,
    SpectrogramUNetConfig,
)
from stable_audio_lite.nn.steps import step_features

PAPER = SpectrogramUNetConfig()
TINY = SpectrogramUNetConfig(width=8, multipliers=(1, 2, 2), blocks=1, attention=(8,), groups=4)
BINS = 32


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Layers that start at zero would hide what is tested here."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture
def unet() -> torch.nn.Module:
    return perturbed(SpectrogramUNet(TINY, BINS))


def inputs(batch: int = 3, frames: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 2, BINS, frames), torch.tensor([0.0, 12.5, 3999.0])[:batch]


def on_meta(**changes) -> SpectrogramUNet:
    with torch.device("meta"):
        return SpectrogramUNet(dataclasses.replace(PAPER, **changes), bins=512, channels=2)


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Sizes


def test_plain_resampling_with_a_tdf_in_each_of_32_blocks_has_the_papers_31_3_million():
    model = on_meta()
    assert 31_290_000 <= size(model) <= 31_320_000
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock2d)]
    assert len(blocks) == 32 and all(isinstance(block.tdf, TDF) for block in blocks)
    assert size(model) == 31_308_642 and size(on_meta(tdf=None)) == 31_047_426


def test_a_tdf_narrows_by_16_but_never_below_16_bins():
    widths = {m.layers[0].in_features: m.layers[0].out_features for m in on_meta().modules() if isinstance(m, TDF)}
    assert widths == {512: 32, 256: 16, 128: 16, 64: 16, 32: 16, 16: 16}


@pytest.mark.parametrize("attention", [(), (8,), (32, 16)])
def test_attention_sits_only_at_the_named_numbers_of_bins(attention):
    model = SpectrogramUNet(dataclasses.replace(TINY, attention=attention), BINS)
    seen = []
    for module in model.modules():
        if isinstance(module, Attention2d):
            module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-1]))
    x, t = inputs()
    model(x, t)
    # One block down and two up, and one in the middle of the innermost level.
    assert sorted(seen) == sorted(bins for bins in attention for _ in range(4 if bins == 8 else 3))


# What goes in and comes out


@pytest.mark.parametrize("frames", [4, 12, 64])
def test_any_number_of_frames_that_the_levels_divide(frames):
    model = perturbed(SpectrogramUNet(TINY, BINS))
    x, t = inputs(frames=frames)
    out = model(x, t)
    assert out.shape == x.shape and out.is_contiguous() and out.isfinite().all()


def test_a_new_network_predicts_nothing_yet():
    x, t = inputs()
    assert SpectrogramUNet(TINY, BINS)(x, t).abs().max() == 0


def test_a_new_residual_block_without_tdf_and_a_new_attention_change_nothing():
    x = torch.randn(2, 8, 4, 16)
    block = ResidualBlock2d(dataclasses.replace(TINY, tdf=None), 8, 8, 16)
    assert torch.equal(block(x, torch.randn(2, 32)), x)
    assert torch.equal(Attention2d(8, 2, 4)(x), x)


def test_every_parameter_gets_a_gradient():
    model = perturbed(SpectrogramUNet(TINY, BINS))
    x, t = inputs()
    model(x, t).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_time_and_input_matter_even_fractions_of_a_step(unet):
    x, t = inputs()
    reference = unet(x, t)
    assert (unet(x, t + 0.5) - reference).abs().amax((1, 2, 3)).min() > 1e-4
    assert (unet(-x, t) - reference).abs().amax((1, 2, 3)).min() > 1e-2


def test_an_item_comes_out_the_same_alone_and_in_a_batch(unet):
    x, t = inputs()
    together = unet(x, t)
    for i in range(3):
        torch.testing.assert_close(unet(x[i : i + 1], t[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only():
    model = perturbed(SpectrogramUNet(dataclasses.replace(TINY, dropout=0.5), BINS))
    x, t = inputs()
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


def test_step_features_are_sinusoids_of_periods_up_to_10000():
    features = step_features(torch.tensor([0.0, 2.5]), 8, 10_000.0)
    angles = [2.5 * 10_000 ** (-i / 4) for i in range(4)]
    expected = torch.tensor([[1.0] * 4 + [0.0] * 4, [math.cos(a) for a in angles] + [math.sin(a) for a in angles]])
    torch.testing.assert_close(features, expected)
    assert step_features(torch.tensor([2.5], dtype=torch.bfloat16), 8, 10_000.0).dtype == torch.float32


# Layers


def test_group_norm_is_torchs_then_a_scale_and_a_shift_of_each_item():
    norm = perturbed(GroupNorm2d(4, 16))
    x, film = 3 + torch.randn(2, 16, 3, 5), torch.randn(2, 32)
    plain = F.group_norm(x, 4, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), plain)
    expected = plain * (1 + film[:, :16, None, None]) + film[:, 16:, None, None]
    torch.testing.assert_close(norm(x, film), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("groups", "channels", "expected"), [(32, 64, 32), (32, 192, 32), (32, 16, 8), (32, 24, 4)])
def test_groups_have_at_least_two_channels_and_divide_them(groups, channels, expected):
    assert GroupNorm2d(groups, channels).groups == expected


def test_norms_keep_float32_statistics_of_bfloat16():
    torch.manual_seed(0)
    x = (30 + torch.randn(2, 8, 64, 64)).bfloat16()
    film = torch.zeros(2, 16)
    for out in (GroupNorm2d(4, 8).bfloat16()(x, film.bfloat16()), GroupNorm2d(4, 8)(x, film)):
        # Of 8,192 numbers around 30, bfloat16 sums would miss the mean by far.
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), F.group_norm(x.float(), 4), atol=0.02, rtol=0.01)


def test_a_tdf_mixes_the_bins_of_one_channel_and_frame_and_nothing_else():
    tdf = perturbed(TDF(8, 2))
    x = torch.randn(1, 2, 3, 8)
    jacobian = torch.autograd.functional.jacobian(tdf, x)[0, :, :, :, 0]  # c, t, f of the output, then of the input
    across = jacobian.abs().amax((2, 5))  # c, t, c', t'
    same = torch.einsum("ctct->ct", across)
    assert same.min() > 0.1
    assert torch.equal(across, torch.einsum("ct,cC,tT->ctCT", same, torch.eye(2), torch.eye(3)))
    assert (jacobian[0, 0, :, 0, 0].abs() > 1e-6).float().mean() > 0.3  # bins see each other, where ReLU lets them


def test_a_tdf_is_the_same_for_all_channels_and_frames_and_only_adds():
    tdf = perturbed(TDF(16, 4))
    x = torch.randn(2, 3, 5, 16)
    frames, channels = torch.randperm(5), torch.randperm(3)
    torch.testing.assert_close(tdf(x[:, channels][:, :, frames]), tdf(x)[:, channels][:, :, frames])
    assert (tdf(x) - x).min() >= -1e-6 and (tdf(x) - x).max() > 0.1


def test_attention_equals_the_textbooks_over_all_bins_and_frames():
    attention = perturbed(Attention2d(8, 2, 4))
    x = torch.randn(1, 8, 3, 4)
    tokens = attention.norm(x).flatten(2)[0].T
    q, k, v = attention.to_qkv(tokens).chunk(3, dim=-1)
    heads = [torch.softmax(q[:, head] @ k[:, head].T / 2, dim=-1) @ v[:, head] for head in (slice(0, 4), slice(4, 8))]
    expected = x + attention.to_out(torch.cat(heads, dim=-1)).T.reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


# Precision, memory, compiling


def test_bfloat16_weights_run_and_stay_close(unet):
    x, t = inputs()
    reference = unet(x, t)
    out = unet.to(torch.bfloat16)(x, t)
    assert out.dtype == torch.float32
    assert (out - reference).std() < 0.1 * reference.std()
    assert unet(x.bfloat16(), t).dtype == torch.bfloat16


def test_trains_under_autocast(unet):
    x, t = inputs()
    reference = unet(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unet(x, t)
    assert out.dtype == torch.float32
    assert (out - reference).std() < 0.1 * reference.std()
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_compiles_without_graph_breaks(unet):
    x, t = inputs()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), unet(x, t))


def test_learns_a_random_target_by_heart():
    torch.manual_seed(0)
    model = SpectrogramUNet(TINY, BINS)
    x, t = inputs(frames=8)
    target = torch.randn_like(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = (model(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 7}, "width must be even, got 7"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"groups": -1}, "groups must be at least 1, got -1"),
        ({"multipliers": ()}, r"multipliers needs entries of at least 1, got \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers .* got \(1, 0\)"),
        ({"tdf": 0}, "tdf must be at least 1, or null for none, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "bins", "message"),
    [
        ({}, 30, "bins must be a multiple of 4 for 3 multipliers, got 30"),
        ({"attention": (8, 12)}, 32, "attention names 12 bins, but the levels have 32, 16, 8"),
        ({"heads": 3}, 32, "heads must divide the 16 channels at 8 bins, got 3"),
    ],
)
def test_a_config_that_does_not_fit_the_bins_is_refused(change, bins, message):
    with pytest.raises(ValueError, match=message):
        SpectrogramUNet(dataclasses.replace(TINY, **change), bins)


def test_bad_inputs_are_refused(unet):
    x, t = inputs()
    with pytest.raises(ValueError, match=r"\(B, 2, 32, T\), got \(3, 2, 31, 12\)"):
        unet(x[:, :, :31], t)
    with pytest.raises(ValueError, match="frames must be a multiple of 4, got 10"):
        unet(x[..., :10], t)
    with pytest.raises(ValueError, match="no context"):
        unet(x, t, context=object())
