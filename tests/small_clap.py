"""A small CLAP with random weights, for tests."""

from __future__ import annotations

import torch

from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.mel import SAMPLE_RATE
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.clap.tokenizer import train_tokenizer

PROMPTS = ["a slow piano ballad in C major", "drums", "a fast rock song with loud drums and bass, 140 bpm"]
SIZES = ClapConfig(
    vocab_size=300,
    text_width=32,
    text_layers=3,
    text_heads=2,
    text_feed_forward=64,
    text_positions=34,
    max_tokens=32,
    audio_width=8,
    audio_patch=8,
    audio_depths=(1, 1),
    audio_heads=(1, 2),
    audio_fusion=False,
    embedding=16,
)


def small_clap(config: ClapConfig = SIZES) -> Clap:
    torch.manual_seed(0)
    return Clap(config, train_tokenizer(PROMPTS * 3, config.vocab_size)).eval()


def tones(seconds: float = 2.0) -> torch.Tensor:
    """A low and a high tone (2, T) at 48 kHz."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in (110.0, 3000.0)])
