"""Facts about a model without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stable_audio_lite import bundle
from stable_audio_lite.conditioning.conditioner import Conditioner
from stable_audio_lite.conditioning.text import TextEncoder
from stable_audio_lite.config import to_dict
from stable_audio_lite.models.vae import VAE


def describe(name: str | Path) -> dict[str, Any]:
    """Facts about a model config (a YAML file) or a bundle, as plain values for printing or JSON.

    Parameters are counted by building each part without memory for its weights.

    Raises:
        UserError: no such config or bundle, or a key in it is wrong.
    """
    is_config = Path(name).suffix in (".yaml", ".yml") and not Path(name).is_dir()
    where = Path(name) if is_config else bundle.resolve(name)
    config = bundle.load_model_config(where)
    with torch.device("meta"):
        parts = {
            "vae": VAE(config.vae),
            "text_encoder": TextEncoder(config.clap, tokenizer=None),  # type: ignore[arg-type]
            "conditioner": Conditioner(config.timing, config.context_width),
            "unet": bundle.build_unet(config),
        }
    parameters = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    facts: dict[str, Any] = {
        "kind": config.kind,
        "format": config.format,
        "sample_rate": config.sample_rate,
        "window_seconds": round(config.window_seconds, 3),
        "window_samples": config.window_samples,
        "latent_shape": list(config.latent_shape),
        "samples_per_latent_frame": config.hop,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "generation": to_dict(config.generation),
    }
    if not is_config:
        facts["parts"] = [part for part in bundle.PARTS if bundle.part_path(where, part).is_file()]
        facts["model"] = bundle.model_hash(where)
    return facts
