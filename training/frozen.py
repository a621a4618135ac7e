"""The frozen CLAP that a U-Net is trained with: from our own bundle or from pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stable_audio_lite.bundle import CONFIG_FILE, SHIPPED, TOKENIZER_FILE, load_part, part_path, read_part
from stable_audio_lite.clap.model import Clap, ClapConfig, load_state, load_tokenizer
from stable_audio_lite.clap.text import TextEncoder, load_clap, split_clap
from stable_audio_lite.errors import UserError
from stable_audio_lite.systems import load_model_config


@dataclass(frozen=True)
class FrozenClap:
    """The text encoder to condition on, and the parts that the exported bundle takes over."""

    text: TextEncoder
    parts: dict[str, dict[str, Tensor]]

    def check_same(self, theirs: Mapping[str, Tensor], bundle: str, source: str) -> None:
        """Refuse the text encoder of a `bundle` to go on from, if it isn't this one, which came from `source`.

        Raises:
            UserError: weights differ by more than bfloat16's rounding, in which shipped bundles store them.
        """
        ours = self.parts["text_encoder"]
        if theirs.keys() != ours.keys() or not all(
            v.shape == ours[k].shape and torch.allclose(v.float(), ours[k].float(), rtol=1e-2, atol=1e-3)
            for k, v in theirs.items()
        ):
            raise UserError(f"initial: {bundle} was trained with another text encoder than that of {source}")


def load_frozen_clap(source: str, clap: ClapConfig) -> FrozenClap:
    """Load the CLAP at `source`: a bundle, a transformers folder or hub id, or a LAION `.pt`.

    Raises:
        UserError: it can't be read, or its sizes differ from the model config's `clap`.
    """
    folder = SHIPPED.get(source, Path(source))
    if (folder / CONFIG_FILE).is_file():
        compare_claps(load_model_config(folder).clap, clap, source)
        text = TextEncoder(clap, load_tokenizer(folder / TOKENIZER_FILE))
        load_part(folder, "text_encoder", text)
        names = [n for n in ("text_encoder", "audio_encoder") if part_path(folder, n).is_file()]
        return FrozenClap(text, {n: read_part(folder, n) for n in names})
    weights = load_clap(source)
    compare_claps(weights.config, clap, source)
    whole = Clap(weights.config, weights.tokenizer)
    load_state(whole.model, weights.state, weights.source)
    return FrozenClap(TextEncoder.from_weights(weights), split_clap(whole))


def compare_claps(found: ClapConfig, wanted: ClapConfig, source: str) -> None:
    """Refuse a CLAP at `source` of other sizes than those `wanted`.

    Raises:
        UserError: names what differs.
    """
    different = [
        f"clap.{k} is {v!r} there, {getattr(wanted, k)!r} here"
        for k, v in vars(found).items()
        if v != getattr(wanted, k)
    ]
    if different:
        raise UserError(f"{source}: another CLAP than the model config's: {'; '.join(different)}")
