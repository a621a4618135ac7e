"""Facts about a model without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stable_audio_lite import bundle
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.clap.tokenizer import learned_words, load_tokenizer, ran_out
from stable_audio_lite.config import find_config, to_dict
from stable_audio_lite.models.conditioner import Conditioner, TimingConfig
from stable_audio_lite.request import milliseconds
from stable_audio_lite.systems import ComplexSTFTConfig, SpectralConfig, StableAudioConfig, build_vae, load_system


def describe(name: str | Path) -> dict[str, Any]:
    """Facts about a model config of any system (a YAML file) or a bundle, as plain values for printing or JSON.

    Parameters are counted by building each part without memory for its weights.

    Raises:
        UserError: no such config or bundle, or a key in it is wrong.
    """
    is_config = not Path(name).is_dir() and (Path(name).suffix in (".yaml", ".yml") or find_config(name).is_file())
    where = Path(name) if is_config else bundle.resolve(name)
    config = load_system(where)
    with torch.device("meta"):
        parts, facts = _latent(config) if isinstance(config, StableAudioConfig) else _spectral(config)
    parameters = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    facts = {
        "kind": config.kind,
        "format": config.format,
        **facts,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "generation": to_dict(config.generation),
    }
    if not is_config:
        facts["parts"] = [part for part in bundle.PARTS if bundle.part_path(where, part).is_file()]
        facts["model"] = bundle.model_hash(where)
        if config.clap and (file := where / bundle.TOKENIZER_FILE).is_file():
            tokenizer = load_tokenizer(file)
            facts["words"] = learned_words(tokenizer) if ran_out(tokenizer, config.clap.vocab_size) else []
    return facts


def _latent(config: StableAudioConfig) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    parts = {"vae": build_vae(config.vae), **_text(config.clap, config.timing), "unet": config.network()}
    return parts, {
        "sample_rate": config.sample_rate,
        "window_seconds": milliseconds(config.window_seconds),
        "window_samples": config.window_samples,
        "latent_shape": list(config.latent_shape),
        "samples_per_latent_frame": config.hop,
    }


def _spectral(config: SpectralConfig) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    shape = config.spectrogram
    facts: dict[str, Any] = {
        "sample_rate": shape.sample_rate,
        "window_seconds": milliseconds(shape.seconds),
        "window_samples": shape.samples,
        "spectrogram_shape": list(shape.shape),
        "samples_per_frame": shape.hop,
        "predicts": config.process.objective,
        "schedule": to_dict(config.schedule),
    }
    if isinstance(config, ComplexSTFTConfig):
        return {"unet": config.network()}, facts
    text = _text(config.clap, config.timing) if config.clap else {}
    return {**text, "transformer": config.network()}, facts | {"reads_text": config.transformer.text}


def _text(clap: ClapConfig, timing: TimingConfig) -> dict[str, nn.Module]:
    encoder = TextEncoder(clap, tokenizer=None)  # type: ignore[arg-type]
    return {"text_encoder": encoder, "conditioner": Conditioner(timing, clap.text_width)}
