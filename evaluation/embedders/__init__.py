"""Networks that turn sounds into vectors, each with its own rate, channels, level and windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evaluation.streams import Level
from stable_audio_lite.audio.io import AudioSource

NAMES = ("openl3", "passt", "clap")


class Embedder(Protocol):
    """What a Fréchet distance, or the nearest neighbours of a sound, can be taken with.

    Attributes:
        name: one of `NAMES`.
        sample_rate: Hz that the network hears.
        channels: how many it hears, one after the other.
        unit: what an embedding is of: "windows", or "" for whole sounds.
        settings: whatever changes embeddings: weights, rates, channels, windows, level.
    """

    name: str
    sample_rate: int
    channels: int
    unit: str
    settings: dict[str, Any]

    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """ "embedding" (windows, D) of a file, on the CPU; perhaps more, by name.

        Raises:
            UserError: the file can't be read.
        """
        ...


def load_embedder(
    name: str, source: str | None, folder: Path, device: torch.device, *, level: Level, batch: int, content: str
) -> Embedder:
    """An embedder on its device.

    Args:
        name: one of `NAMES`.
        source: where its weights are; None: in `folder`, under the name that they are published by.
        folder: of weights.
        device: to compute on.
        level: that sounds are brought to.
        batch: windows that go through the network at once.
        content: what OpenL3 was trained on, "music" or "env".

    Raises:
        Missing: they are not there; the message says what to do.
        UserError: they are damaged, or another network's.
    """
    if name == "openl3":
        from evaluation.embedders import openl3

        path = openl3.PUBLISHED[content].find(source, folder)
        return openl3.OpenL3Embedder(openl3.load_openl3(path).to(device), level, batch)
    if name == "passt":
        from evaluation.embedders import passt

        passt.check_installed()
        path = passt.PUBLISHED.find(source, folder)
        return passt.PaSSTEmbedder(passt.load_passt(path).to(device), level, batch)
    from evaluation.embedders import clap

    return clap.load_clap_embedder(source, folder, device, level)
