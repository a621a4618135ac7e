"""The training benchmark compares equals: the peer gives the same output from the same weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evaluation.benchmarks import vae_training as benchmark
from evaluation.benchmarks.vae_training import PeerVAE, peer_discriminator, time_training
from stable_audio_lite.models.dac import state_to_dac
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig

TINY = Path(__file__).parent.parent / "configs/stable_audio/tiny.yaml"
SMALL = WaveformVAEConfig(encoder_width=4, decoder_width=32)


def test_peer_is_the_same_network() -> None:
    torch.manual_seed(0)
    ours, peer = WaveformVAE(SMALL), PeerVAE(SMALL)
    state = state_to_dac(ours) | {f"project.{k}": v for k, v in ours.encoder.project.state_dict().items()}
    peer.load_state_dict(state)
    audio, noise = 0.1 * torch.randn(1, 2, 8192), torch.randn(1, 64, 8)
    with torch.no_grad():
        for a, b in zip(ours(audio, noise), peer(audio, noise), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_peer_discriminator_is_the_same_in_the_usual_layout() -> None:
    torch.manual_seed(0)
    judge = DiscriminatorConfig(windows=(256, 64), filters=4)
    ours, peer = Discriminator(judge), peer_discriminator(judge)
    peer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for (a, first), (b, second) in zip(ours(audio := torch.randn(2, 2, 4096)), peer(audio), strict=True):
            for one, other in zip((a, *first), (b, *second), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            assert all(x.is_contiguous(memory_format=torch.channels_last) for x in first)
            assert all(x.is_contiguous() for x in second)


def test_times_both() -> None:
    judge = DiscriminatorConfig(windows=(256,), filters=4)
    speeds = time_training(TINY, judge, batch=1, frames=8, precision="no", steps=1)
    assert speeds.ours > 0 and speeds.peer > 0


def test_speeds_are_seconds_of_audio_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of known length, the first of which does not count."""

    def taking(seconds: float) -> Callable[..., Callable[[], None]]:
        calls = itertools.count()
        return lambda *_: lambda: time.sleep(seconds if next(calls) else 0)

    monkeypatch.setattr(benchmark, "our_step", taking(0.05))
    monkeypatch.setattr(benchmark, "peer_step", taking(0.2))
    judge = DiscriminatorConfig(windows=(256,), filters=4)
    speeds = time_training(TINY, judge, batch=2, frames=8, precision="no", steps=2)
    seconds = 2 * 8 * 1024 / 44100
    assert speeds.ours == pytest.approx(seconds / 0.05, rel=0.3)
    assert speeds.peer == pytest.approx(seconds / 0.2, rel=0.3)
