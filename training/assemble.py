"""Put a bundle to ship together: python -m training.assemble --config configs/stable_audio/assemble.yaml.

Takes the U-Net and text encoder of one bundle and the VAE of another whose encoder is the same (its decoder may have
been trained on), and stores all but the VAE in half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stable_audio_lite.bundle import CARD_FILE, PARTS, TOKENIZER_FILE, part_path, read_part, save_bundle
from stable_audio_lite.config import from_dict, to_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.representation import encoder_hash
from stable_audio_lite.systems import load_model_config
from training.command import main


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """What to put together.

    Attributes:
        bundle: complete bundle that training.train_diffusion wrote, or one of a VAE alone.
        vae: bundle whose VAE replaces the bundle's, or null.
        model: model YAML whose `generation` defaults the result gets, or null to keep the bundle's.
        output: folder for the result; what documents it there, README.md and pictures, is kept.
    """

    bundle: str
    vae: str | None = None
    model: str | None = None
    output: str


def run(config: AssembleConfig) -> Path:
    """Write the bundle; returns its folder.

    Raises:
        UserError: the two VAEs have different encoders, or a part is missing.
    """
    source, output = Path(config.bundle), Path(config.output)
    model = load_model_config(source)
    if config.model:
        generation = to_dict(load_model_config(config.model))["generation"]
        model = from_dict(type(model), to_dict(model) | {"generation": generation}, config.model)
    parts = {name: read_part(source, name) for name in PARTS if part_path(source, name).is_file()}
    if config.vae:
        vae = read_part(config.vae, "vae")
        if encoder_hash(vae) != encoder_hash(parts["vae"]):
            raise UserError(f"{config.vae}: has another encoder than {source}, so the U-Net does not know its latents")
        parts["vae"], model = vae, replace(model, vae=load_model_config(config.vae).vae)
    halved = {
        name: {k: v if name == "vae" or not v.is_floating_point() else v.to(torch.bfloat16) for k, v in state.items()}
        for name, state in parts.items()
    }
    file = source / TOKENIZER_FILE
    tokenizer = file.read_text(encoding="utf-8") if file.is_file() else None
    save_bundle(output, model, halved, tokenizer, _kept(output))
    return output


def _kept(output: Path) -> dict[str, bytes]:
    files = [output / CARD_FILE, *output.glob("*.png")]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


if __name__ == "__main__":
    main(__doc__, AssembleConfig, run)
