"""Import of checkpoints of stable-audio-tools, and of diffusers' AutoencoderOobleck, as bundles; export of bundles.

Systems like Stable Audio 1.0's come whole, VAEs alone or out of a system; the CLAP, which those checkpoints lack, is
read from its own source. Lightning's hold the weights twice, as trained and averaged. Tensors keep their types.

What differs from stable-audio-tools after import: seconds between whole ones are mixed, and the noise is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stable_audio_lite import bundle
from stable_audio_lite.clap.checkpoints import read_checkpoint
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_apart, replacing, resolved, save_tensors
from stable_audio_lite.interchange.model_config import (
    VAE_PREFIX,
    Described,
    check_expressible,
    read_model_config,
    write_model_config,
)
from stable_audio_lite.interchange.tensors import places
from stable_audio_lite.systems import StableAudioConfig, load_model_config
from stable_audio_lite.weights import check_tensors, read_safetensors, read_weights

_WRAPPERS = {"diffusion.": ("diffusion_ema.ema_model.", "model."), "autoencoder.": ("autoencoder_ema.ema_model.", "")}


def import_checkpoint(
    path: str | Path,
    config: str | Path,
    output: str | Path,
    *,
    ema: bool = False,
    vae_only: bool = False,
    clap: str | Path | None = None,
) -> StableAudioConfig:
    """Write a checkpoint as the bundle `output`; returns the bundle's config.

    Args:
        path: .ckpt or .safetensors.
        config: its JSON.
        output: folder of the bundle.
        ema: take Lightning's averaged weights.
        vae_only: take only the VAE, of a system of any kind.
        clap: source of the CLAP that the system was trained with (see `clap.checkpoints`); None leaves it out.

    Raises:
        UserError: a file is missing, damaged or holds code, the config has what we can't do, tensors don't fit it, or
            the bundle can't be written.
    """
    bundle.check_replaceable(output)
    sources: list[str | Path] = [path, config, *([] if clap is None else [clap])]
    for source in sources:
        if resolved(output) in (file := resolved(source), *file.parents):
            raise UserError(f"{output}: holds {source}, which is read; write to another place")
    described = read_model_config(config, vae_only=vae_only)
    system, whole = described.config, described.scale is not None
    if clap is not None and not whole:
        raise UserError(f"{config}: a VAE alone reads no text; leave out the CLAP")
    texts = read_checkpoint(clap) if clap is not None else None
    if texts is not None:
        system = replace(system, clap=texts.config)
        check_expressible(system, whole, str(clap))
    state = _unwrapped(read_weights(Path(path)), path, ema)
    if vae_only or not whole:
        state = {key: value for key, value in state.items() if key.startswith(described.prefix)}
    found = places(described)
    check_tensors(state, {place.foreign: place.like for place in found}, str(path), Path(config).name)
    parts: dict[str, dict[str, Tensor]] = {}
    for place in found:
        parts.setdefault(place.part, {})[place.name] = place.inward(state[place.foreign])
    if described.scale is not None:
        channels = system.vae.latent_channels
        parts["unet"] |= {
            "latent_mean": torch.zeros(channels),
            "latent_std": torch.full((channels,), described.scale),
        }
    if texts is not None:
        parts |= texts.parts
    bundle.save_bundle(output, system, parts, texts.tokenizer.to_str() if texts else None)
    return system


def export_checkpoint(folder: str | Path, output: str | Path, config: str | Path) -> Described:
    """Write a bundle as a checkpoint of stable-audio-tools with its `model_config.json`; returns what that says.

    A bundle without a U-Net is written as a VAE alone. The CLAP stays behind.

    Args:
        folder: of the bundle.
        output: .safetensors or .ckpt.
        config: where the JSON goes.

    Raises:
        UserError: a part is missing or damaged, stable-audio-tools has no such network, or a file can't be written.
    """
    source = bundle.resolve(folder)
    check_apart(source.iterdir(), [output, config])
    system = load_model_config(source)
    whole = bundle.part_path(source, "unet").is_file()
    check_expressible(system, whole, str(source / bundle.CONFIG_FILE))
    described = Described(system)
    if whole:
        described = Described(system, scale=_scale(source), prefix=VAE_PREFIX)
    found = places(described)
    parts = {name: bundle.read_part(source, name) for name in {place.part for place in found}}
    for name, state in parts.items():
        expected = {place.name: place.inward(place.like) for place in found if place.part == name}
        own = {key: value for key, value in state.items() if not key.startswith("latent_")}
        check_tensors(own, expected, str(bundle.part_path(source, name)), bundle.CONFIG_FILE)
    tensors = {place.foreign: place.outward(parts[place.part][place.name]).contiguous() for place in found}
    with replacing(output) as weights, replacing(config) as described_in:
        if Path(output).suffix == ".safetensors":
            save_tensors(weights, tensors, {"format": "pt"})
        else:
            torch.save({"state_dict": tensors}, weights)
        write_model_config(described_in, described)
    return described


def _unwrapped(state: Mapping[str, Tensor], path: str | Path, ema: bool) -> dict[str, Tensor]:
    """Weights under the model's own names, of Lightning's checkpoint or of one that is unwrapped already."""
    names = ((".parametrizations.weight.original0", ".weight_g"), (".parametrizations.weight.original1", ".weight_v"))
    for new, classic in names:
        state = {key.replace(new, classic): value for key, value in state.items()}
    prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in state)), None)
    if prefix is None:
        if ema:
            raise UserError(f"{path}: is unwrapped, so its weights are the only ones; ask for no averages")
        return dict(state)
    averages, target = _WRAPPERS[prefix]
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    averaged = {target + key.removeprefix(averages): v for key, v in state.items() if key.startswith(averages)}
    if ema and not averaged:
        raise UserError(f"{path}: holds no averaged weights ({averages}*); ask for no averages")
    return own | averaged if ema else own


def _scale(folder: Path) -> float:
    """The one number by which a U-Net's latents are divided."""
    file = bundle.part_path(folder, "unet")
    statistics = read_safetensors(file, ("latent_mean", "latent_std"))[0]
    mean, std = statistics["latent_mean"], statistics["latent_std"]
    if bool(mean.any()) or bool((std != std[0]).any()):
        raise UserError(
            f"{file}: its latents are normalised channel by channel, which stable-audio-tools can't do; a U-Net that "
            "was imported, or trained on from one, can be exported"
        )
    return std[0].item()
