"""Metrics that others published, with the settings that they hold for."""

from __future__ import annotations

COLUMNS = {
    "fd_openl3": {"title": "FD-OpenL3 ↓", "network": "mel256, music, 512", "embedder": "openl3"},
    "kl_passt": {"title": "KL-PaSST ↓", "network": "32 kHz, AudioSet", "embedder": "passt"},
    "clap_score": {"title": "CLAP score ↑", "network": "LAION 630k, fusion", "embedder": "clap"},
}
"""By metric: a column's title, the network that the papers take, and the key of ours in a result's settings."""

TABLES = (
    {
        "data": "MusicCaps, 95 s",
        "source": "Evans et al. 2024, Fast Timing-Conditioned Latent Audio Diffusion",
        "address": "https://arxiv.org/abs/2402.04825",
        "models": {
            "Stable Audio": (108.69, 0.80, 0.46),
            "MusicGen-large": (197.12, 0.85, 0.36),
            "MusicGen-large-stereo": (216.07, 1.04, 0.32),
            "AudioLDM2-large": (339.25, 1.46, 0.30),
            "AudioLDM2-48k": (299.47, 2.77, 0.22),
            "Stable Audio's training set": (101.47, None, None),
            "its training set through its VAE": (117.52, None, None),
        },
    },
    {
        "data": "Song Describer, no singing, 47 s",
        "source": "Evans et al. 2024, Stable Audio Open",
        "address": "https://arxiv.org/abs/2407.14358",
        "models": {
            "Stable Audio 1": (142.50, 0.40, 0.38),
            "Stable Audio 2": (71.25, 0.37, 0.42),
            "Stable Audio Open": (96.51, 0.55, 0.41),
        },
    },
)
"""Tables of models that were measured alike, each with its `COLUMNS`; None where the paper has no value."""
