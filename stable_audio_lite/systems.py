"""Configs of all systems by their `kind`, and of the two that work on spectrograms: networks and denoisers.

`complex_stft` is the 2-D U-Net that predicts noise on complex spectrograms, for restoration (Saito et al. 2022, arXiv
2211.04124). `spectrogram_transformer` predicts the clean spectrogram, with or without text. `stable_audio`, the latent
system, has its config in `stable_audio_lite.bundle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from stable_audio_lite.audio.spectrogram import SpectrogramConfig
from stable_audio_lite.bundle import FORMAT, TIMING_TOKENS, GenerationDefaults, StableAudioConfig, read_config
from stable_audio_lite.clap.model import ClapConfig
from stable_audio_lite.config import from_dict
from stable_audio_lite.diffusion.denoiser import NetworkDenoiser, Objective
from stable_audio_lite.diffusion.schedule import DiscreteSchedule, ScheduleConfig
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import TimingConfig
from stable_audio_lite.models.spectrogram_transformer import SpectrogramTransformer, SpectrogramTransformerConfig
from stable_audio_lite.models.spectrogram_unet import SpectrogramUNet, SpectrogramUNetConfig


@dataclass(frozen=True, kw_only=True)
class ComplexSTFTConfig:
    """The 2-D U-Net on complex spectrograms.

    Attributes:
        kind: which system this is.
        format: version of the bundle's layout.
        spectrogram: what the network sees.
        schedule: the forward process that it is trained with.
    """

    part: ClassVar[str] = "unet"
    objective: ClassVar[Objective] = "eps"
    clap: ClassVar[None] = None

    kind: Literal["complex_stft"]
    format: int = FORMAT
    spectrogram: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    unet: SpectrogramUNetConfig = field(default_factory=SpectrogramUNetConfig)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        if self.spectrogram.frames % (shrinks := 2 ** (len(self.unet.multipliers) - 1)):
            raise ValueError(f"spectrogram.frames must be a multiple of {shrinks}, got {self.spectrogram.frames}")

    def network(self) -> nn.Module:
        """The network with random weights."""
        return SpectrogramUNet(self.unet, bins=self.spectrogram.bins)


@dataclass(frozen=True, kw_only=True)
class SpectrogramDiffusionConfig:
    """The transformer on spectrograms.

    Attributes:
        kind: which system this is.
        format: version of the bundle's layout.
        spectrogram: what the network sees.
        schedule: the forward process that it is trained with.
        clap: the text encoder to condition on, where `transformer.text` says so.
        timing: embeddings of seconds_start and seconds_total, used with text.
    """

    part: ClassVar[str] = "transformer"
    objective: ClassVar[Objective] = "x0"

    kind: Literal["spectrogram_transformer"]
    format: int = FORMAT
    spectrogram: SpectrogramConfig
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="linear", steps=1000))
    transformer: SpectrogramTransformerConfig = field(default_factory=SpectrogramTransformerConfig)
    clap: ClapConfig | None = None
    timing: TimingConfig = field(default_factory=TimingConfig)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        if self.transformer.text != (self.clap is not None):
            raise ValueError("transformer.text and clap go together: a text encoder for a network that reads text")

    @property
    def context_width(self) -> int | None:
        """Width of the tokens that the network attends to, or None."""
        return self.clap.text_width if self.clap else None

    @property
    def context_tokens(self) -> int | None:
        """How many tokens the network attends to, the text's and two of timing, or None."""
        return self.clap.max_tokens + TIMING_TOKENS if self.clap else None

    def network(self) -> nn.Module:
        """The network with random weights."""
        shape = self.spectrogram
        return SpectrogramTransformer(
            self.transformer,
            bins=shape.bins,
            frames=shape.frames,
            context_width=self.context_width,
            context_tokens=self.context_tokens,
        )


SpectralConfig = ComplexSTFTConfig | SpectrogramDiffusionConfig
SystemConfig = StableAudioConfig | SpectralConfig
SYSTEMS: dict[str, type[SystemConfig]] = {
    "stable_audio": StableAudioConfig,
    "complex_stft": ComplexSTFTConfig,
    "spectrogram_transformer": SpectrogramDiffusionConfig,
}


SPECTRAL = tuple(kind for kind in SYSTEMS if kind != "stable_audio")
"""Kinds of the systems that work on spectrograms."""


def load_system(path: str | Path) -> SystemConfig:
    """Read the config of any system from a YAML file or from a bundle folder.

    Raises:
        UserError: no such file, made by another version of this package, or a key is wrong.
    """
    file, data = read_config(path)
    if (cls := SYSTEMS.get(str(data.get("kind")))) is None:
        raise UserError(f"{file}: key 'kind' must be one of {', '.join(SYSTEMS)}, got {data.get('kind')!r}")
    return from_dict(cls, data, str(file))


def load_spectral(path: str | Path) -> SpectralConfig:
    """Like `load_system`, for the systems that work on spectrograms; another is refused."""
    config = load_system(path)
    if isinstance(config, StableAudioConfig):
        raise UserError(f"{path}: is of kind {config.kind}; a model that works on spectrograms is wanted here")
    return config


def denoiser(config: SpectralConfig, network: Callable[..., Tensor], context: Any = None) -> NetworkDenoiser:
    """(x, sigma) -> x0 by the network under one context; see `NetworkDenoiser`."""
    return NetworkDenoiser(network, context, config.objective, DiscreteSchedule(config.schedule).step)
