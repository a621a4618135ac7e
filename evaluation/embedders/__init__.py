"""Networks that turn sounds into vectors, each with its own rate, channels, level and windows."""

from __future__ import annotations

from pathlib import Path

import torch

from evaluation.embedders.streams import TargetLevel
from evaluation.store import Embedder


def load_embedder(
    name: str, source: str | None, folder: Path, device: torch.device, level: TargetLevel, *, batch: int, content: str
) -> Embedder:
    """Load an embedder onto its device.

    Args:
        name: "openl3", "passt" or "clap".
        source: where its weights are; None: in `folder`, under the name that they are published by.
        level: that sounds are brought to.
        batch: windows that go through the network at once.
        content: what OpenL3 was trained on, "music" or "env".

    Raises:
        Missing: they are not there; the message says what to do.
        UserError: they are damaged, or another network's.
    """
    if name == "openl3":
        from evaluation.embedders import openl3

        path = openl3.OPENL3_WEIGHTS[content].find(source, folder)
        return openl3.OpenL3Embedder(openl3.load_openl3(path).to(device), level, batch)
    if name == "passt":
        from evaluation.embedders import passt

        passt.check_installed()
        path = passt.PASST_WEIGHTS.find(source, folder)
        return passt.PaSSTEmbedder(passt.load_passt(path).to(device), level, batch)
    from evaluation.embedders import clap

    return clap.load_clap_embedder(source, folder, device, level)
