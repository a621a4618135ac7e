"""The metrics by name."""

from __future__ import annotations

from typing import Any

from evaluation.metrics.distances import frechet_metric
from evaluation.metrics.inputs import CalibratedMetric, MetricInputs
from evaluation.metrics.scores import clap_score, kl_passt

EMBEDDERS = ("openl3", "passt", "clap")
METRICS = tuple(f"{kind}_{name}" for kind in ("fd", "fd_inf") for name in EMBEDDERS) + ("kl_passt", "clap_score")
"""fd_NAME: Fréchet distance; fd_inf_NAME: the same extrapolated to infinitely many sounds."""

DEFAULTS = ("fd_openl3", "kl_passt", "clap_score", "fd_clap")


def embedder_of(metric: str) -> str:
    """Name of the embedder that a metric needs."""
    return "clap" if metric == "clap_score" else metric.rpartition("_")[2]


def calibrated(metric: str, embedder: Any, inputs: MetricInputs) -> CalibratedMetric:
    """One of `METRICS`, beside what it is for real recordings, white noise, shuffled captions and a VAE alone.

    Raises:
        Missing: there is too little to take it of.
    """
    if metric == "kl_passt":
        return kl_passt(embedder, inputs)
    if metric == "clap_score":
        return clap_score(embedder, inputs)
    return frechet_metric(metric, embedder, inputs)
