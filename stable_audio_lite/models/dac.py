"""Weights from and to descript-audio-codec (Kumar et al. 2023, arXiv 2306.06546), whose blocks the VAE shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_audio_lite.errors import UserError
from stable_audio_lite.models.waveform_vae import WaveformVAE
from stable_audio_lite.weights import read_pickle


@dataclass(frozen=True)
class DacWeights:
    """A `weights.pth` as read: the `state` dict, and the arguments of `dac.DAC` that give its `shape` (may be none)."""

    state: dict[str, Tensor]
    shape: dict[str, Any]


def read_dac(path: str | Path) -> DacWeights:
    """Read a `weights.pth` of descript-audio-codec; only tensors and plain values are unpickled.

    Raises:
        UserError: the file is missing, damaged, holds code, or is no DAC.
    """
    state, data = read_pickle(path)
    if not any(key.startswith("encoder.block.") for key in state):
        raise UserError(f"{path}: holds no DAC encoder; give a weights.pth of descript-audio-codec")
    return DacWeights(state, data.get("metadata", {}).get("kwargs", {}))


def state_from_dac(dac_state: Mapping[str, Tensor], vae: WaveformVAE) -> dict[str, Tensor]:
    """Turn a descript-audio-codec state dict into one for `vae` of the same widths and strides.

    DAC is mono: its first convolution is widened to `audio_channels` inputs (divided by their number, so that equal
    channels give DAC's response) and its last to as many outputs. Tensors that DAC lacks (the posterior's projection)
    or has in another width (the decoder's first convolution, behind DAC's quantizer) keep the values of `vae`.

    Raises:
        UserError: any other tensor that both have differs in shape.
    """
    channels = vae.config.audio_channels
    last = f"decoder.layers.{len(vae.config.strides) + 2}."
    state = dict(vae.state_dict())
    first = dac_state.get(dac_name("encoder.layers.0.weight_v"))
    mono = channels > 1 and first is not None and first.shape[1] == 1
    for key, value in dac_state.items():
        name = _our_name(key)
        if name is None or name not in state:
            continue
        if mono and name == "encoder.layers.0.weight_v":
            value = value.repeat(1, channels, 1)
        elif mono and name == "encoder.layers.0.weight_g":
            # The copies made |v| grow by sqrt(channels) and the response by channels: undo the latter.
            value = value / math.sqrt(channels)
        elif channels > 1 and name.startswith(last) and value.shape[0] == 1:
            value = value.repeat(channels, *[1] * (value.ndim - 1))
        if name.startswith("decoder.layers.0.") and value.shape != state[name].shape:
            continue
        if value.shape != state[name].shape:
            raise UserError(
                f"DAC tensor '{key}' has shape {tuple(value.shape)}, the VAE needs {tuple(state[name].shape)}: "
                "set encoder_width, decoder_width and strides to the DAC file's"
            )
        state[name] = value
    return state


def state_to_dac(vae: WaveformVAE) -> dict[str, Tensor]:
    """The VAE's encoder and decoder under descript-audio-codec's names, for blocks of the same shape."""
    return {dac_name(key): value for key, value in vae.state_dict().items() if ".project." not in key}


def _our_name(key: str) -> str | None:
    if key.startswith("encoder.block."):
        return "encoder." + key.removeprefix("encoder.").replace("block.", "layers.")
    if key.startswith("decoder.model."):
        return "decoder.layers." + key.removeprefix("decoder.model.").replace("block.", "layers.")
    return None


def dac_name(key: str) -> str:
    """Name in descript-audio-codec of what the VAE calls `key`."""
    part, rest = key.split(".layers.", 1)
    top = "block" if part == "encoder" else "model"
    return f"{part}.{top}." + rest.replace("layers.", "block.")
