"""The VAE on waveforms: size, equality with descript-audio-codec's blocks, exact pieces, folding, fused Snake."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch
from torch import nn

from stable_audio_lite.errors import UserError
from stable_audio_lite.models import waveform_vae
from stable_audio_lite.models.dac import read_dac, state_from_dac, state_to_dac
from stable_audio_lite.models.vae import Posterior
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig
from stable_audio_lite.nn import conv
from stable_audio_lite.nn.snake import FoldedSnake, Snake

SMALL = WaveformVAEConfig(encoder_width=4, decoder_width=32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def lively(vae: WaveformVAE) -> WaveformVAE:
    """Weights as a trained model may have them: every parameter away from its initial value."""
    for name, parameter in vae.named_parameters():
        scale = 0.3 if name.endswith("alpha") else 0.1
        parameter.data += scale * parameter.data.abs().mean() * torch.randn_like(parameter)
    return vae


def test_paper_size_counts_exactly() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in WaveformVAE(WaveformVAEConfig()).parameters()) == 133_431_300


def test_same_output_as_descript_audio_codec() -> None:
    """One state in both gives the same output to 1e-5, encoder and decoder."""
    from dac.model.dac import Decoder, Encoder

    mono = WaveformVAEConfig(audio_channels=1, encoder_width=4, decoder_width=32)
    vae = lively(WaveformVAE(mono))
    encoder = Encoder(4, [4, 4, 8, 8], 64)
    decoder = Decoder(64, 32, [8, 8, 4, 4])
    decoder.model[-1] = nn.Identity()  # DAC ends in tanh
    state = state_to_dac(vae)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})
    audio, latents = 0.1 * torch.randn(2, 1, 8192), torch.randn(2, 64, 8)
    with torch.no_grad():
        torch.testing.assert_close(vae.encoder.layers(audio), encoder(audio), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(latents), decoder(latents), atol=1e-5, rtol=1e-5)
    again = WaveformVAE(mono)
    again.load_state_dict(state_from_dac(state, again))
    with torch.no_grad():
        torch.testing.assert_close(again.decode(latents), vae.decode(latents), atol=0, rtol=0)


def test_warm_start_widens_mono_to_stereo() -> None:
    """Equal channels through the widened VAE give the mono VAE's hidden features, and its output on both sides."""
    mono = lively(WaveformVAE(WaveformVAEConfig(audio_channels=1, encoder_width=4, decoder_width=32)))
    stereo = WaveformVAE(SMALL)
    stereo.load_state_dict(state_from_dac(state_to_dac(mono), stereo))
    audio, latents = 0.1 * torch.randn(1, 1, 4096), torch.randn(1, 64, 4)
    with torch.no_grad():
        hidden = stereo.encoder.layers(audio.repeat(1, 2, 1))
        torch.testing.assert_close(hidden, mono.encoder.layers(audio), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stereo.decode(latents), mono.decode(latents).repeat(1, 2, 1), atol=1e-5, rtol=1e-5)


def test_stereo_blocks_go_to_dacs_names_and_back() -> None:
    vae = lively(WaveformVAE(SMALL))
    again = state_from_dac(state_to_dac(vae), WaveformVAE(SMALL))
    assert all(torch.equal(again[k], v) for k, v in vae.state_dict().items() if ".project." not in k)


def test_dac_file_is_read_and_others_are_refused(tmp_path: Path) -> None:
    """A file as descript-audio-codec saves it loads; code, other weights and a missing file are one-line errors."""
    state = state_to_dac(WaveformVAE(SMALL))
    torch.save({"state_dict": state, "metadata": {"kwargs": {"encoder_dim": 4}}}, tmp_path / "weights.pth")
    assert read_dac(tmp_path / "weights.pth").state.keys() == state.keys()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save({"state_dict": Path.cwd}, tmp_path / "code.pth")
    for name, words in (("other.pth", "no DAC"), ("code.pth", "more than weights"), ("none.pth", "no such file")):
        with pytest.raises(UserError, match=words):
            read_dac(tmp_path / name)


def test_dac_of_another_width_is_refused() -> None:
    other = WaveformVAE(WaveformVAEConfig(encoder_width=16, decoder_width=32))
    with pytest.raises(UserError, match="encoder_width"):
        state_from_dac(state_to_dac(other), WaveformVAE(SMALL))


@pytest.mark.parametrize("blocks", ["dac", "oobleck"])
@pytest.mark.parametrize("frames", [1, 33, 70])
def test_encoding_is_the_same_with_and_without_gradients(frames: int, blocks: str) -> None:
    """Without, layers of the higher rates run over pieces: in float64 the same to rounding."""
    vae = lively(WaveformVAE(replace(SMALL, blocks=blocks))).double()
    audio = torch.randn(2, 2, frames * 1024, dtype=torch.float64)
    whole = vae.encode(audio)
    with torch.no_grad():
        pieces = vae.encode(audio)
    torch.testing.assert_close(pieces.mean, whole.mean.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pieces.std, whole.std.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 60])
@pytest.mark.parametrize("chunk", [2, 3, 13])
def test_pieces_equal_whole(frames: int, chunk: int) -> None:
    """In float64 nothing but the halo can differ: pieces and whole agree to rounding."""
    vae = lively(WaveformVAE(SMALL)).double()
    latents = torch.randn(1, 64, frames, dtype=torch.float64)
    audio = torch.randn(1, 2, frames * 1024 - 100, dtype=torch.float64)
    with torch.no_grad():
        whole, pieces = vae.decode(latents), torch.cat(list(vae.decode_stream(latents, chunk)), 2)
        torch.testing.assert_close(pieces.double(), whole, atol=1e-5, rtol=1e-5)
        early = torch.cat(list(vae.decode_stream(latents, chunk, frames=7)), 2)
        torch.testing.assert_close(early.double(), whole[:, :, : min(frames, 7) * 1024], atol=1e-5, rtol=1e-5)
        one, many = vae.encode(audio), vae.encode_chunked(audio, chunk)
        torch.testing.assert_close(many.mean, one.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(many.std, one.std, atol=1e-5, rtol=1e-5)
        streamed = list(vae.encode_stream(audio.split(1500, 2), chunk))
        assert {p.mean.shape[2] for p in streamed[:-1]} <= {chunk}
        torch.testing.assert_close(torch.cat([p.mean for p in streamed], 2), one.mean, atol=1e-5, rtol=1e-5)


def test_a_gpu_computes_the_same_in_longer_pieces_and_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = lively(WaveformVAE(SMALL)).prepare_for_inference()
    audio = torch.randn(1, 2, 300 * vae.hop)
    with torch.no_grad():
        posterior, pieces = vae.encode_chunked(audio), list(vae.decode_stream(latents := torch.randn(1, 64, 300)))
        monkeypatch.setattr(waveform_vae, "_at_once", lambda x: waveform_vae._AT_ONCE_ON_GPU)
        monkeypatch.setattr(conv, "_suits_images", lambda x: x.shape[1] % 8 == 0)
        on_gpu, longer = vae.encode_chunked(audio), list(vae.decode_stream(latents))
    assert [len(pieces), len(longer)] == [10, 2]
    torch.testing.assert_close(on_gpu.mean, posterior.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(longer, 2), torch.cat(pieces, 2), atol=1e-4, rtol=1e-4)


def test_streams_hold_no_more_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder sees one piece and what it depends on, and no block is taken before it is needed."""
    vae, chunk = WaveformVAE(SMALL), 16
    seen, held, taken = [], [], []
    encode, part = vae.encode, vae._encode_part
    monkeypatch.setattr(vae, "encode", lambda audio: (seen.append(audio.shape[2]), encode(audio))[1])
    monkeypatch.setattr(vae, "_encode_part", lambda audio, *at: (held.append(audio.shape[2]), part(audio, *at))[1])

    def blocks() -> Iterator[torch.Tensor]:
        for number in range(40):
            taken.append(number)
            yield torch.zeros(1, 2, 4 * SMALL.hop)

    stream = vae.encode_stream(blocks(), chunk)
    next(stream)
    assert len(taken) == math.ceil((chunk + vae.encoder_halo) / 4)
    assert sum(p.mean.shape[2] for p in stream) == 160 - chunk
    assert max(seen) <= (chunk + 2 * vae.encoder_halo) * SMALL.hop
    assert max(held) <= (chunk + 2 * vae.encoder_halo + 4) * SMALL.hop


def test_folding_changes_nothing() -> None:
    vae = lively(WaveformVAE(SMALL))
    latents, audio = torch.randn(1, 64, 5), torch.randn(1, 2, 3000)
    with torch.no_grad():
        before, mean = vae.decode(latents), vae.encode(audio).mean
        vae.prepare_for_inference()
        torch.testing.assert_close(vae.decode(latents), before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.encode(audio).mean, mean, atol=1e-5, rtol=1e-5)
    assert not any("weight_g" in name for name, _ in vae.named_parameters())


@pytest.mark.parametrize(("items", "frames", "as_image"), [(1, 1, False), (2, 4, False), (2, 5, True), (1, 65, True)])
def test_folded_transposed_convolutions_are_the_same(items: int, frames: int, as_image: bool) -> None:
    """By one product and, from a quarter of the 32 channels on, as an image with two taps."""
    layer = conv.WeightNormConvTranspose1d(32, 16, 8, 4, padding=2)
    nn.init.normal_(layer.bias)
    x = torch.randn(items, 32, frames)
    with torch.no_grad():
        before = layer(x)
        layer.fold()
        with mock.patch.object(conv.F, "conv2d", wraps=conv.F.conv2d) as convolve:
            torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)
    assert convolve.called == as_image


@pytest.mark.parametrize("blocks", ["dac", "oobleck"])
@pytest.mark.parametrize("folded_first", [True, False])
def test_folded_snakes_compute_in_the_weights_type(folded_first: bool, blocks: Literal["dac", "oobleck"]) -> None:
    vae = lively(WaveformVAE(replace(SMALL, blocks=blocks)))
    if folded_first:
        vae.prepare_for_inference().to(torch.bfloat16)
    else:
        vae.to(torch.bfloat16).prepare_for_inference()
    snakes = [module for module in vae.modules() if isinstance(module, FoldedSnake)]

    def types() -> set[tuple[torch.dtype, torch.dtype]]:
        return {(s.frequency.dtype, s(torch.randn(1, 1, 4)).dtype) for s in snakes if s.frequency is not None}

    assert types() == {(torch.float32, torch.bfloat16)}
    vae.cpu()  # moves to a device alone change no type
    assert types() == {(torch.float32, torch.bfloat16)}
    vae.float()
    assert types() == {(torch.float32, torch.float32)}


def test_bf16_weights_run_throughout() -> None:
    vae = lively(WaveformVAE(SMALL))
    latents = torch.randn(1, 64, 12)
    with torch.no_grad():
        exact = vae.decode(latents)
        vae.to(torch.bfloat16).prepare_for_inference()
        rounded = torch.cat(list(vae.decode_stream(latents, 4)), 2)
        assert vae.encode(torch.randn(1, 2, 2048)).mean.isfinite().all()
    assert (rounded - exact).square().mean() < 1e-3 * exact.square().mean()


def test_any_length_is_padded_to_whole_frames() -> None:
    assert WaveformVAE(SMALL).encode(torch.zeros(1, 2, 1025)).mean.shape == (1, 64, 2)


@pytest.mark.parametrize("shape", [(2, 4096), (1, 1, 4096), (1, 2, 0)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected audio \(B, 2, T\)"):
        WaveformVAE(SMALL).encode(torch.zeros(shape))


def test_kl_matches_torch_distributions() -> None:
    mean, std = torch.randn(3, 4, 5), torch.rand(3, 4, 5) + 0.1
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    )
    # The reference's KL leaves out the factor 1/2.
    torch.testing.assert_close(Posterior(mean, std).kl(), 2 * exact.sum(1).mean())


def test_snake_value_and_gradients() -> None:
    snake = Snake(3).double()
    snake.alpha.data = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(1, 3, 1)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    expected = x + torch.sin(snake.alpha * x) ** 2 / snake.alpha
    torch.testing.assert_close(snake(x), expected, atol=1e-7, rtol=1e-7)
    wanted = torch.autograd.grad(expected.pow(3).sum(), (x, snake.alpha))
    got = torch.autograd.grad(snake(x).pow(3).sum(), (x, snake.alpha))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_config_refuses_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="strides"):
        WaveformVAEConfig(strides=(3, 4))
    with pytest.raises(ValueError, match="decoder_width"):
        WaveformVAEConfig(decoder_width=100)
    assert math.prod(WaveformVAEConfig().strides) == WaveformVAEConfig().hop == 1024
