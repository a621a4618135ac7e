"""Store a bundle in 16 bits for release: python -m training.assemble --config configs/stable_audio/assemble.yaml.

The decoder of a second phase takes the place of the bundle's where one is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from stable_audio_lite.bundle import CARD_FILE, PARTS, SHIPPED, TOKENIZER_FILE, part_path, read_part, save_bundle
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import resolved
from stable_audio_lite.representation import encoder_hash
from stable_audio_lite.systems import StableAudioConfig, load_model_config, load_system
from training.command import main
from training.frozen import check_stage


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """The bundle to store.

    Attributes:
        bundle: folder that a trainer wrote.
        vae: bundle whose VAE replaces the bundle's, or null.
        model: model YAML whose `generation` defaults the result gets, or null to keep the bundle's.
        output: folder for the result; its README.md and pictures are kept.
    """

    bundle: str
    vae: str | None = None
    model: str | None = None
    output: str


def run(config: AssembleConfig) -> Path:
    """Write the bundle; returns its folder.

    Raises:
        UserError: the two VAEs have different encoders, a part is missing, the model is of another kind, or `output` is
            a shipped bundle or one that is read.
    """
    source, output = Path(config.bundle), Path(config.output)
    for name, folder in SHIPPED.items():
        if resolved(output) == resolved(folder):
            raise UserError(f"output: {output} is the shipped {name} with its card; choose a new folder")
    for read in filter(None, (config.bundle, config.vae)):
        if resolved(output) == resolved(read):
            raise UserError(f"output: {output} is the bundle that is read; choose a new folder")
    check_stage("bundle", config.bundle, "training.train_diffusion (or training.train_vae, for a VAE alone)")
    check_stage("vae", config.vae, "training.train_vae")
    system = load_system(source)
    if config.model:
        other = load_system(config.model)
        if other.kind != system.kind:
            raise UserError(f"model: {config.model} is of kind {other.kind}, {source} of kind {system.kind}")
        system = replace(system, generation=other.generation)
    parts = {name: read_part(source, name) for name in PARTS if part_path(source, name).is_file()}
    if config.vae:
        if "vae" not in parts:
            raise UserError(f"{source}: holds no VAE that another could take the place of; leave out 'vae'")
        vae = read_part(config.vae, "vae")
        if not isinstance(system, StableAudioConfig) or encoder_hash(vae) != encoder_hash(parts["vae"]):
            raise UserError(f"{config.vae}: has another encoder than {source}, so the U-Net does not know its latents")
        parts["vae"], system = vae, replace(system, vae=load_model_config(config.vae).vae)
    file = source / TOKENIZER_FILE
    tokenizer = file.read_text(encoding="utf-8") if file.is_file() else None
    halved = {name: {k: _halved(v) for k, v in state.items()} for name, state in parts.items()}
    save_bundle(output, system, halved, tokenizer, _kept(output))
    return output


def _halved(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _kept(output: Path) -> dict[str, bytes]:
    files = [output / CARD_FILE, *output.glob("*.png")]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


if __name__ == "__main__":
    main(__doc__, AssembleConfig, run)
