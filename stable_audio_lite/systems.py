"""Configs of all systems by their `kind`, and the networks that they describe.

`stable_audio` is the latent system (Evans et al. 2024, arXiv 2402.04825). `complex_stft` is the 2-D U-Net that predicts
noise on complex spectrograms, for restoration (Saito et al. 2022, arXiv 2211.04124). `spectrogram_transformer` predicts
the clean spectrogram, with or without text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from stable_audio_lite.audio.spectrogram import SpectrogramConfig
from stable_audio_lite.bundle import FORMAT, read_config
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.config import from_dict
from stable_audio_lite.diffusion.process import CosineProcess, DiscreteProcess, Process, ScheduleConfig
from stable_audio_lite.diffusion.samplers import SAMPLERS, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import TimingConfig
from stable_audio_lite.models.spectrogram_transformer import SpectrogramTransformer, SpectrogramTransformerConfig
from stable_audio_lite.models.spectrogram_unet import SpectrogramUNet, SpectrogramUNetConfig
from stable_audio_lite.models.spectrogram_vae import SpectrogramVAE, SpectrogramVAEConfig
from stable_audio_lite.models.unet import UNet, UNetConfig
from stable_audio_lite.models.vae import VAE
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig

TIMING_TOKENS = 2
"""Number of tokens that seconds_start and seconds_total add to the text's."""


MAX_CFG, MAX_STEPS = 100.0, 10_000
"""Largest guidance scale, and the most sampling steps; far below them sound is noise, or as good as it gets."""


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Defaults of `generate`; each bundle owns the values that suit its weights.

    Attributes:
        steps: sampling steps.
        cfg: classifier-free guidance scale; 1 is none.
        rescale: 0..1, how far guidance is pulled back to the unguided standard deviation of each frame.
        sampler: one of `stable_audio_lite.diffusion.samplers.SAMPLERS`.
        sigma_min: the noise level at the end, relative to latents of unit standard deviation.
        sigma_max: the noise level at the start.
        rho: curvature of the polyexponential noise levels.
        windows: further lengths in frames, shorter than the window, that the network is trained on and sampled with,
            each sound in the shortest that holds it.
    """

    steps: int = 100
    cfg: float = 6.0
    rescale: float = 0.0
    sampler: str = "dpmpp-2m"
    sigma_min: float = 0.01
    sigma_max: float = 100.0
    rho: float = 1.0
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        polyexponential_sigmas(min(self.steps, 1), self.sigma_min, self.sigma_max, self.rho)  # checks them
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps must be at most {MAX_STEPS}, got {self.steps}")
        if not 0 <= self.cfg <= MAX_CFG:
            raise ValueError(f"cfg must lie in 0..{MAX_CFG:g}, got {self.cfg}")
        if self.windows and min(self.windows) < 1:
            raise ValueError(f"windows must be at least 1 frame each, got {self.windows}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in 0..1, got {self.rescale}")


@dataclass(frozen=True, kw_only=True)
class StableAudioConfig:
    """A whole system: the VAE, the text encoder, the timing embeddings and the U-Net.

    `format` is the version of the bundle's layout, `latent_frames` the length of the window that the U-Net generates.
    """

    part: ClassVar[str] = "unet"

    kind: Literal["stable_audio"]
    format: int = FORMAT
    sample_rate: int = 44100
    latent_frames: int
    vae: WaveformVAEConfig | SpectrogramVAEConfig
    clap: ClapConfig
    timing: TimingConfig = field(default_factory=TimingConfig)
    unet: UNetConfig
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {self.format}")
        if self.sample_rate < 1 or self.latent_frames < 1:
            raise ValueError("sample_rate and latent_frames must be at least 1")
        if self.generation.windows and max(self.generation.windows) >= self.latent_frames:
            raise ValueError(
                f"generation.windows must be shorter than latent_frames {self.latent_frames}, got "
                f"{self.generation.windows}"
            )
        if self.vae.audio_channels != 2:
            raise ValueError(f"vae.audio_channels must be 2: sound is stereo throughout, got {self.vae.audio_channels}")
        if self.window_seconds > self.timing.max_seconds:
            raise ValueError(
                f"the window of {self.window_seconds:.1f} s exceeds timing.max_seconds {self.timing.max_seconds}"
            )

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return self.vae.hop

    @property
    def window_samples(self) -> int:
        """Samples that one generation spans."""
        return self.latent_frames * self.hop

    @property
    def window_seconds(self) -> float:
        """Seconds that one generation spans."""
        return self.window_samples / self.sample_rate

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(channels, frames) of one generation's latents."""
        return self.vae.latent_channels, self.latent_frames

    @property
    def context_width(self) -> int:
        """Width of the tokens that the U-Net attends to."""
        return self.clap.text_width

    @property
    def context_tokens(self) -> int:
        """Number of tokens that the U-Net attends to: the text's and two of timing."""
        return self.clap.max_tokens + TIMING_TOKENS

    @property
    def process(self) -> Process:
        """The forward process and objective that the U-Net is trained with."""
        return CosineProcess("v")

    def network(self) -> UNet:
        """The U-Net with random weights."""
        return UNet(
            self.unet,
            channels=self.vae.latent_channels,
            context_width=self.context_width,
            context_tokens=self.context_tokens,
        )


def build_vae(config: WaveformVAEConfig | SpectrogramVAEConfig) -> VAE:
    """Build the VAE of a config, with random weights."""
    return WaveformVAE(config) if isinstance(config, WaveformVAEConfig) else SpectrogramVAE(config)


@dataclass(frozen=True, kw_only=True)
class ComplexSTFTConfig:
    """The 2-D U-Net on complex spectrograms; `schedule` is the forward process that it is trained with."""

    part: ClassVar[str] = "unet"
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

    @property
    def process(self) -> Process:
        """The forward process and objective that the network is trained with."""
        return DiscreteProcess(self.schedule, "eps")

    def network(self) -> nn.Module:
        """The network with random weights."""
        return SpectrogramUNet(self.unet, bins=self.spectrogram.bins)


@dataclass(frozen=True, kw_only=True)
class SpectrogramDiffusionConfig:
    """The transformer on spectrograms; `schedule` is the forward process that it is trained with.

    `clap` is the text encoder to condition on, where `transformer.text` says so; `timing` is used with text alone.
    """

    part: ClassVar[str] = "transformer"

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
        """Number of tokens that the network attends to, the text's and two of timing, or None."""
        return self.clap.max_tokens + TIMING_TOKENS if self.clap else None

    @property
    def process(self) -> Process:
        """The forward process and objective that the network is trained with."""
        return DiscreteProcess(self.schedule, "x0")

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


def load_system(path: str | Path) -> SystemConfig:
    """Read the config of any system from a YAML file or from a bundle folder.

    Raises:
        UserError: no such file, made by another version of this package, or a key is wrong.
    """
    file, data = read_config(path)
    if (cls := SYSTEMS.get(str(data.get("kind")))) is None:
        raise UserError(f"{file}: key 'kind' must be one of {', '.join(SYSTEMS)}, got {data.get('kind')!r}")
    _without_retired(file, data)
    return from_dict(cls, data, str(file))


def load_model_config(path: str | Path) -> StableAudioConfig:
    """Read a config like `load_system`, but refuse any system except the latent one."""
    config = load_system(path)
    if not isinstance(config, StableAudioConfig):
        raise UserError(f"{path}: is of kind {config.kind}; a model of kind stable_audio is wanted here")
    return config


_RETIRED: dict[str, dict[str, Any]] = {
    "vae": {"slow_channels": 0, "clock": 1},
    "unet": {"resample": "plain"},
    "generation": {"distilled": None},
}
"""Options of earlier versions, with the value that means that a bundle doesn't use them."""


def _without_retired(file: Path, data: dict[str, Any]) -> None:
    """Remove retired options from a config that doesn't use them.

    Raises:
        UserError: it uses one.
    """
    for part, options in _RETIRED.items():
        settings = data.get(part)
        if not isinstance(settings, dict):
            continue
        for name, unused in options.items():
            if (value := settings.pop(name, unused)) != unused:
                raise UserError(
                    f"{file}: key '{part}.{name}' is {value!r}, which this version no longer has; "
                    "train a new model, or use the version that made it"
                )
