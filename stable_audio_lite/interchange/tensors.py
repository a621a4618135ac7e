"""Each of our tensors, its name elsewhere and its shape there.

Names are made from ours, so that all of a file's can be told from those that belong there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stable_audio_lite.interchange.model_config import Described
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.models.dac import dac_name
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig
from stable_audio_lite.nn.frames import Conv, Upsample
from stable_audio_lite.nn.snake import SnakeBeta
from stable_audio_lite.systems import build_vae

# From our names in the U-Net to those of stable-audio-tools, in this order.
_UNET = (
    (r"\b(transformer|middle)\.(to_in|to_out)\.", r"\1.\2.1."),
    (r"\b(transformer|middle)\.norm\.", r"\1.to_in.0."),
    (r"attention\.to_out\.", "attention.attention.to_out."),
    (r"\.norm_in\.", ".block1.groupnorm."),
    (r"\.conv_in\.", ".block1.project."),
    (r"\.film\.", ".to_scale_shift.to_scale_shift.1."),
    (r"\.norm_out\.", ".block2.groupnorm."),
    (r"\.conv_out\.", ".block2.project."),
    (r"\.skip\.", ".to_out."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1.\2.\1sample."),
    (r"^(down|up)\.", r"\1samples."),
    (r"^block_(in|out)\.", r"to_\1.block."),
    (r"^middle_in\.", "bottleneck.pre_block."),
    (r"^middle_out\.", "bottleneck.post_block."),
    (r"^middle\.", "bottleneck.transformer."),
    (r"^time\.0\.frequencies$", "to_time.0.0.weights"),
    (r"^time\.", "to_time.0."),
    (r"^mapping\.", "to_mapping."),
    (r"^null$", "fixed_embedding.embedding.weight"),
)
_UNIT = ("snake1", "conv1", "snake2", "conv2")
_BLOCKS = {
    "encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"),
    "decoder": ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"),
}


@dataclass(frozen=True)
class Place:
    """The place of a tensor here and in a file.

    Attributes:
        part: of a bundle.
        name: in that part.
        foreign: name in the file.
        like: tensor on the meta device, of the file's shape.
        inward: turn the file's tensor into ours.
        outward: turn ours into the file's.
    """

    part: str
    name: str
    foreign: str
    like: Tensor
    inward: Callable[[Tensor], Tensor]
    outward: Callable[[Tensor], Tensor]


def places(described: Described) -> list[Place]:
    """List the places of all tensors in a checkpoint of this config."""
    config, vae = described.config, described.config.vae
    assert isinstance(vae, WaveformVAEConfig)

    def vae_name(name: str) -> str:
        if described.layout == "diffusers":
            return _diffusers_name(name, len(vae.strides))
        return described.prefix + (_dac_name(name) if vae.blocks == "dac" else name)

    with torch.device("meta"):
        modules: list[tuple[str, nn.Module, Callable[[str], str]]] = [("vae", build_vae(vae), vae_name)]
        if described.scale is not None:
            conditioner = Conditioner(config.timing, config.context_width)
            modules += [("unet", config.network(), _unet_name), ("conditioner", conditioner, _conditioner_name)]
    flat = described.layout == "stable-audio-tools"
    return [place for part, module, rename in modules for place in _of(part, module, rename, flat)]


def _of(part: str, module: nn.Module, rename: Callable[[str], str], flat: bool) -> Iterator[Place]:
    for path, owner in module.named_modules():
        for leaf, value in owner.named_parameters(recurse=False):
            name = f"{path}.{leaf}".lstrip(".")
            inward, outward = _shapes(owner, name, flat)
            yield Place(part, name, rename(name), outward(value.data), inward, outward)


def _shapes(owner: nn.Module, name: str, flat: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Turn a file's tensor into ours, and ours into the file's."""
    if isinstance(owner, Conv) and name.endswith(".weight"):  # C', C, k there
        return lambda v: v.permute(0, 2, 1).flatten(1), lambda v: v.unflatten(1, (owner.kernel, -1)).permute(0, 2, 1)
    if isinstance(owner, Upsample) and name.endswith(".weight"):  # C, C', 2 factor there
        taps = 2 * owner.factor
        return lambda v: v.permute(2, 1, 0).flatten(0, 1), lambda v: v.unflatten(0, (taps, -1)).permute(2, 1, 0)
    if re.search(r"\b(transformer|middle)\.to_(in|out)\.weight$", name):  # a convolution of one tap there
        return lambda v: v.squeeze(2), lambda v: v.unsqueeze(2)
    if isinstance(owner, SnakeBeta) and flat:
        return lambda v: v[None, :, None], lambda v: v.flatten()
    return lambda v: v, lambda v: v


def _dac_name(name: str) -> str:
    part, rest = name.split(".", 1)
    return name.replace(".project.", ".proj_out.") if rest.startswith("project.") else f"{part}.{dac_name(name)}"


def _diffusers_name(name: str, depth: int) -> str:
    part, *rest = name.split(".")
    level, *inner = (int(word) for word in rest if word.isdigit())
    if not inner:
        words = [{0: "conv1", depth + 1: "snake1", depth + 2: "conv2"}[level]]
    else:
        words = ["block", str(level - 1), _BLOCKS[part][inner[0]], *(_UNIT[i] for i in inner[1:])]
    return ".".join([part, *words, rest[-1]])


def _unet_name(name: str) -> str:
    for pattern, replacement in _UNET:
        name = re.sub(pattern, replacement, name)
    return f"model.model.{name}"


def _conditioner_name(name: str) -> str:
    return f"conditioner.conditioners.{name.replace('.', '.int_embedder.')}"
