"""Figures that others published, with the settings that they hold for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a paper says of one model; None where it says nothing."""

    model: str
    fd_openl3: float
    kl_passt: float | None = None
    clap_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that were measured alike: on which data, at which length, and where they stand."""

    data: str
    source: str
    address: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column: its title, the network that the papers take, and the key of ours in a result's settings."""

    title: str
    network: str
    embedder: str


METRICS = {
    "fd_openl3": Metric(title="FD-OpenL3 ↓", network="mel256, music, 512", embedder="openl3"),
    "kl_passt": Metric(title="KL-PaSST ↓", network="32 kHz, AudioSet", embedder="passt"),
    "clap_score": Metric(title="CLAP score ↑", network="LAION 630k, fusion", embedder="clap"),
}

TABLES = (
    Table(
        data="MusicCaps, 95 s",
        source="Evans et al. 2024, Fast Timing-Conditioned Latent Audio Diffusion",
        address="https://arxiv.org/abs/2402.04825",
        rows=(
            Row(model="Stable Audio", fd_openl3=108.69, kl_passt=0.80, clap_score=0.46),
            Row(model="MusicGen-large", fd_openl3=197.12, kl_passt=0.85, clap_score=0.36),
            Row(model="MusicGen-large-stereo", fd_openl3=216.07, kl_passt=1.04, clap_score=0.32),
            Row(model="AudioLDM2-large", fd_openl3=339.25, kl_passt=1.46, clap_score=0.30),
            Row(model="AudioLDM2-48k", fd_openl3=299.47, kl_passt=2.77, clap_score=0.22),
            Row(model="Stable Audio's training set", fd_openl3=101.47),
            Row(model="its training set through its VAE", fd_openl3=117.52),
        ),
    ),
    Table(
        data="Song Describer, no singing, 47 s",
        source="Evans et al. 2024, Stable Audio Open",
        address="https://arxiv.org/abs/2407.14358",
        rows=(
            Row(model="Stable Audio 1", fd_openl3=142.50, kl_passt=0.40, clap_score=0.38),
            Row(model="Stable Audio 2", fd_openl3=71.25, kl_passt=0.37, clap_score=0.42),
            Row(model="Stable Audio Open", fd_openl3=96.51, kl_passt=0.55, clap_score=0.41),
        ),
    ),
)
