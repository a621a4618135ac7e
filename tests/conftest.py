"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stable_audio_lite.bundle import build_unet, load_model_config, save_bundle
from stable_audio_lite.conditioning.conditioner import Conditioner
from stable_audio_lite.conditioning.text import TextEncoder
from stable_audio_lite.conditioning.tokenizer import train_tokenizer
from stable_audio_lite.models.vae import VAE

TINY = Path(__file__).parents[1] / "configs" / "stable_audio" / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bundle of configs/stable_audio/tiny.yaml with random weights; copy it before changing it."""
    config = load_model_config(TINY)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["warm slow piano", "fast techno drums", "a quiet string quartet"], 280)
    unet = build_unet(config)
    with torch.no_grad():
        # Layers that start at zero would hide the prompt from the output.
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        unet.latent_std.fill_(0.7)
        unet.latent_mean.fill_(0.1)
    parts = {
        "vae": VAE(config.vae),
        "text_encoder": TextEncoder(config.clap, tokenizer),
        "conditioner": Conditioner(config.timing, config.context_width),
        "unet": unet,
    }
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(folder, config, {k: m.state_dict() for k, m in parts.items()}, tokenizer_json=tokenizer.to_str())
    return folder
