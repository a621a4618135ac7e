"""Metrics that others published, with the settings that they hold for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """Metrics of one model as a paper has them; None where it has none."""

    model: str
    fd_openl3: float
    kl_passt: float | None = None
    clap_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Rows that were measured alike: on which data, at which length, and where they were published."""

    data: str
    source: str
    address: str
    rows: tuple[PublishedRow, ...]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, the network that the papers take, and the key of ours in a result's settings."""

    title: str
    network: str
    embedder: str


COLUMNS = {
    "fd_openl3": Column(title="FD-OpenL3 ↓", network="mel256, music, 512", embedder="openl3"),
    "kl_passt": Column(title="KL-PaSST ↓", network="32 kHz, AudioSet", embedder="passt"),
    "clap_score": Column(title="CLAP score ↑", network="LAION 630k, fusion", embedder="clap"),
}

TABLES = (
    PublishedTable(
        data="MusicCaps, 95 s",
        source="Evans et al. 2024, Fast Timing-Conditioned Latent Audio Diffusion",
        address="https://arxiv.org/abs/2402.04825",
        rows=(
            PublishedRow(model="Stable Audio", fd_openl3=108.69, kl_passt=0.80, clap_score=0.46),
            PublishedRow(model="MusicGen-large", fd_openl3=197.12, kl_passt=0.85, clap_score=0.36),
            PublishedRow(model="MusicGen-large-stereo", fd_openl3=216.07, kl_passt=1.04, clap_score=0.32),
            PublishedRow(model="AudioLDM2-large", fd_openl3=339.25, kl_passt=1.46, clap_score=0.30),
            PublishedRow(model="AudioLDM2-48k", fd_openl3=299.47, kl_passt=2.77, clap_score=0.22),
            PublishedRow(model="Stable Audio's training set", fd_openl3=101.47),
            PublishedRow(model="its training set through its VAE", fd_openl3=117.52),
        ),
    ),
    PublishedTable(
        data="Song Describer, no singing, 47 s",
        source="Evans et al. 2024, Stable Audio Open",
        address="https://arxiv.org/abs/2407.14358",
        rows=(
            PublishedRow(model="Stable Audio 1", fd_openl3=142.50, kl_passt=0.40, clap_score=0.38),
            PublishedRow(model="Stable Audio 2", fd_openl3=71.25, kl_passt=0.37, clap_score=0.42),
            PublishedRow(model="Stable Audio Open", fd_openl3=96.51, kl_passt=0.55, clap_score=0.41),
        ),
    ),
)
