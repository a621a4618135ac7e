"""Representations: sound to normalised data and back, for latents and for spectrograms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_audio_lite.audio.spectrogram import SpectrogramConfig
from stable_audio_lite.models.spectrogram_vae import SpectrogramVAE, SpectrogramVAEConfig
from stable_audio_lite.representation import (
    LatentRepresentation,
    SpectrogramRepresentation,
    encoder_hash,
    load_latents,
    load_representation,
)
from stable_audio_lite.systems import StableAudioConfig, load_model_config


@pytest.fixture
def latents(tiny_bundle: Path) -> LatentRepresentation:
    return load_latents(tiny_bundle, load_model_config(tiny_bundle))


def test_latents_are_normalised_by_what_the_network_was_trained_with(tiny_bundle: Path, tmp_path: Path) -> None:
    """Encoded data are the posterior's mean, less the U-Net's mean, over its deviation; decoding takes that back."""
    state = load_file(tiny_bundle / "unet.safetensors")
    mean, std = torch.randn(64), 0.5 + torch.rand(64)
    for name in ("config.yaml", "vae.safetensors"):
        (tmp_path / name).write_bytes((tiny_bundle / name).read_bytes())
    save_file(state | {"latent_mean": mean, "latent_std": std}, tmp_path / "unet.safetensors")
    latents = load_latents(tmp_path, load_model_config(tmp_path))
    audio = 0.1 * torch.randn(1, 2, 5000)
    with torch.no_grad():
        raw = latents.vae.encode(audio).mean
        torch.testing.assert_close(latents.encode(audio), (raw - mean[:, None]) / std[:, None], atol=1e-5, rtol=1e-5)
        sound = latents.vae.decode(raw)[..., :5000]
        torch.testing.assert_close(latents.decode(latents.encode(audio), 5000), sound, atol=1e-5, rtol=1e-4)


def test_a_vae_that_needs_its_digits_keeps_them(tiny_bundle: Path) -> None:
    """A VAE of magnitude spectra stays float32 beside networks of bfloat16, and decodes to the same sound."""
    spectral = SpectrogramVAE(SpectrogramVAEConfig(kind="spectrogram", width=16, encoder_blocks=1, decoder_blocks=1))
    latents = LatentRepresentation(spectral.eval(), load_model_config(tiny_bundle), "")
    x = torch.randn(1, *latents.shape)[..., :8]
    with torch.no_grad():
        before = latents.decode(x, 4096)
        after = latents.to(torch.device("cpu"), torch.bfloat16).decode(x, 4096)
    assert {p.dtype for p in spectral.parameters()} == {torch.float32}
    torch.testing.assert_close(before, after)


def test_silence_fills_a_window(latents: LatentRepresentation) -> None:
    assert latents.silence.shape == latents.shape
    with torch.no_grad():
        expected = latents.encode(torch.zeros(1, 2, latents.window_samples))[0]
    torch.testing.assert_close(latents.silence, expected)


def test_the_hash_is_the_encoders_alone(tiny_bundle: Path, latents: LatentRepresentation) -> None:
    """A decoder may be trained on; one weight of the encoder makes other latents."""
    state = load_file(tiny_bundle / "vae.safetensors")
    assert encoder_hash(state) == latents.hash
    decoder = {k: v + 1 if k.startswith("decoder.") else v for k, v in state.items()}
    assert encoder_hash(decoder) == latents.hash
    encoder = next(k for k in state if k.startswith("encoder."))
    assert encoder_hash(state | {encoder: state[encoder] + 1e-3}) != latents.hash


def test_equal_encoders_have_one_hash_in_however_many_bits(tiny_bundle: Path) -> None:
    """Shipped weights have 16; a decoder trained on from them is stored with 32, and a zero may lose its sign."""
    halved = {k: v.half() for k, v in load_file(tiny_bundle / "vae.safetensors").items()}
    first = next(k for k, v in halved.items() if k.startswith("encoder.") and v.ndim > 1)
    halved[first].view(-1)[0] = -0.0
    widened = {k: v.float() for k, v in halved.items()}
    widened[first].view(-1)[0] = 0.0
    assert encoder_hash(widened) == encoder_hash(halved)


def test_a_vae_alone_has_latents_as_they_are(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "vae.safetensors"):
        (tmp_path / name).write_bytes((tiny_bundle / name).read_bytes())
    latents = load_latents(tmp_path, load_model_config(tmp_path))
    assert not latents.mean.any() and bool((latents.std == 1).all())


def test_spectrograms_come_back(tiny_bundle: Path) -> None:
    config = SpectrogramConfig(sample_rate=8000, window=64, hop=32, frames=16)
    spectrograms = SpectrogramRepresentation(config)
    time = torch.arange(500) / 8000
    audio = 0.3 * torch.sin(2 * torch.pi * 1000 * time)[None, None]
    x = spectrograms.encode(audio)
    assert x.shape == (1, 2, 32, 16) and spectrograms.window_samples == 512
    torch.testing.assert_close(spectrograms.decode(x, 500)[..., 32:-32], audio[..., 32:-32], atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="expected mono"):
        spectrograms.encode(torch.zeros(1, 2, 512))
    other = SpectrogramRepresentation(SpectrogramConfig(sample_rate=8000, window=64, hop=32, frames=16, scale=2.0))
    assert other.hash != spectrograms.hash
    assert isinstance(load_model_config(tiny_bundle), StableAudioConfig)
    assert isinstance(load_representation(tiny_bundle, load_model_config(tiny_bundle)), LatentRepresentation)
