"""The training benchmark compares equals: the peer gives the same output from the same weights."""

from __future__ import annotations

import torch

from stable_audio_lite.models.dac import state_to_dac
from stable_audio_lite.models.discriminator import DiscriminatorConfig
from stable_audio_lite.models.vae import VAE, VAEConfig
from training.benchmark import PeerVAE, measure

SMALL = VAEConfig(encoder_width=4, decoder_width=32)


def test_peer_is_the_same_network() -> None:
    torch.manual_seed(0)
    ours, peer = VAE(SMALL), PeerVAE(SMALL)
    state = state_to_dac(ours) | {f"project.{k}": v for k, v in ours.encoder.project.state_dict().items()}
    peer.load_state_dict(state)
    audio, noise = 0.1 * torch.randn(1, 2, 8192), torch.randn(1, 64, 8)
    with torch.no_grad():
        for a, b in zip(ours(audio, noise), peer(audio, noise), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_measures_both() -> None:
    judge = DiscriminatorConfig(windows=(256,), filters=4)
    speeds = measure(SMALL, judge, 44100, batch=1, frames=8, dtype=torch.float32, steps=1, device="cpu")
    assert speeds.ours > 0 and speeds.peer > 0
