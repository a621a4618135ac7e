"""LoRA (Hu et al. 2021, arXiv 2106.09685): a low-rank update of the U-Net's attention and feed-forward layers.

Training adds it with peft and stores it in peft's format. Generation merges it into the weights,
W + strength * alpha / rank * B A, so that it costs nothing and needs no peft.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder, save_tensors
from stable_audio_lite.weights import read_safetensors

_WEIGHTS_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
TARGETS = r".*\.blocks\.\d+\.((cross_)?attention\.to_(q|kv|out)|feed_forward\.[02])"
"""The linear layers that are adapted: all those of every transformer block."""

_PREFIX = "base_model.model."  # that peft puts before the names of the weights of the module it adapts
_PLAIN = {"use_rslora": False, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size of the update: its `rank`, and `alpha`, which scales it by alpha / rank."""

    rank: int = 16
    alpha: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"rank and alpha must be at least 1, got {self.rank} and {self.alpha}")


def add_lora(unet: nn.Module, config: LoraConfig) -> None:
    """Add a LoRA to `unet`, in place, that changes nothing yet; all other weights are frozen."""
    import peft

    unet.requires_grad_(False)
    peft.inject_adapter_in_model(_peft_config(config), unet)


def save_lora(folder: str | Path, unet: nn.Module, config: LoraConfig, encoder: str) -> None:
    """Write the LoRA that `add_lora` added to `unet`, in the format that `peft.PeftModel.from_pretrained` reads.

    `encoder` identifies the latents that the U-Net is trained on (`stable_audio_lite.representation.encoder_hash`).

    Raises:
        UserError: `folder` holds something other than a LoRA, or can't be written.
    """
    import peft

    target = Path(folder)
    if target.exists() and not (target / _CONFIG_FILE).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: holds other files, no LoRA; choose a new folder")
    state = {_PREFIX + key: value for key, value in peft.get_peft_model_state_dict(unet).items()}
    with replacing_folder(target) as temporary:
        _peft_config(config).save_pretrained(str(temporary))
        save_tensors(temporary / _WEIGHTS_FILE, state, {"format": "pt", "encoder": encoder})


def merged_state(unet: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """State of `unet` as it would be without the LoRA that `add_lora` added, the change merged into its weights."""
    state, merged = unet.state_dict(), dict[str, Tensor]()
    for key, value in state.items():
        if ".lora_" in key:
            continue
        layer, adapted, kind = key.rpartition(".base_layer.")
        if adapted and kind == "weight":
            down, up = (state[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
            value = (value.float() + config.alpha / config.rank * (up @ down)).to(value.dtype)
        merged[key.replace(".base_layer.", ".")] = value
    return merged


def merge_lora(unet: nn.Module, folder: str | Path, encoder: str, strength: float = 1.0) -> None:
    """Add `strength` times the LoRA in `folder` to the weights of `unet`, in place, computed in float32.

    Raises:
        UserError: a file is missing or damaged, the LoRA is for latents other than those of `encoder` or for another
            U-Net, or its kind is not supported.
    """
    scale = strength * _scale(Path(folder) / _CONFIG_FILE)
    state, about = read_safetensors(Path(folder) / _WEIGHTS_FILE)
    if about.get("encoder", encoder) != encoder:
        raise UserError(f"{folder}: is a LoRA for a model with another VAE; choose the model that it was trained on")
    layers = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    extra = set(state) - {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    if not layers or extra:
        raise UserError(f"{folder}: no plain LoRA of linear layers ({min(extra, default='empty')})")
    weights = dict(unet.named_parameters())
    for layer in sorted(layers):
        down, up = (state[f"{layer}.lora_{side}.weight"].float() for side in "AB")  # (rank, in), (out, rank)
        weight = weights.get(f"{layer.removeprefix(_PREFIX)}.weight")
        shape = None if weight is None else tuple(weight.shape)
        if weight is None or shape != (up.shape[0], down.shape[1]):
            raise UserError(
                f"{folder}: '{layer}' changes a weight of shape {(up.shape[0], down.shape[1])}, the model has "
                f"{shape or 'none of that name'}; choose the model that it was trained on"
            )
        with torch.no_grad():
            weight.copy_(weight.float() + scale * (up @ down).to(weight.device))


def _peft_config(config: LoraConfig) -> Any:
    import peft

    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS, lora_dropout=0.0)


def _scale(path: Path) -> float:
    """alpha / rank, as peft's config says."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        odd = next((k for k, v in {**_PLAIN, "peft_type": "LORA"}.items() if (data.get(k) or v) != v), None)
        scale = float(data["lora_alpha"]) / int(data["r"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the folder that a LoRA was trained into") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the config of a LoRA ({' '.join(str(error).split())[:80]})") from error
    if odd:
        raise UserError(f"{path}: {odd} is {data[odd]!r}; plain LoRA alone can be merged")
    return scale
