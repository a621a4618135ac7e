"""The metrics by name."""

from __future__ import annotations

from evaluation.case import Case, Measured
from evaluation.distances import frechet
from evaluation.embedders import NAMES, Embedder
from evaluation.embedders.clap import ClapEmbedder
from evaluation.scores import clap_score, kl_passt

METRICS = tuple(f"{kind}_{name}" for kind in ("fd", "fd_inf") for name in NAMES) + ("kl_passt", "clap_score")
"""fd_NAME: Fréchet distance; fd_inf_NAME: the same extrapolated to infinitely many sounds."""

DEFAULTS = ("fd_openl3", "kl_passt", "clap_score", "fd_clap")


def embedder_of(metric: str) -> str:
    """Name of the embedder that a metric needs."""
    return "clap" if metric == "clap_score" else metric.rpartition("_")[2]


def measure(metric: str, embedder: Embedder, case: Case) -> Measured:
    """One of `METRICS`, beside what it is for real recordings, white noise, shuffled captions and a VAE alone.

    Raises:
        Missing: there is too little to take it of.
    """
    if metric == "kl_passt":
        return kl_passt(embedder, case)
    if metric == "clap_score":
        assert isinstance(embedder, ClapEmbedder)
        return clap_score(embedder, case)
    return frechet(metric, embedder, case)
