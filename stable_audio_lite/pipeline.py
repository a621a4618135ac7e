"""Text to stereo sound: encode the prompts, sample latents, decode them.

    model = StableAudio.from_pretrained("starter")
    result = model.generate(["warm slow piano", "fast techno"], seconds=8, seed=1)
    result.audio  # (2, 2, 8 * 44100) float32: item, channel, sample; full scale is 1

Same prompt, settings, seed and model give the same sound, alone or in a batch (to rounding), on one machine and dtype.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from stable_audio_lite import bundle
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.bundle import StableAudioConfig
from stable_audio_lite.conditioning.conditioner import Conditioner
from stable_audio_lite.conditioning.text import TextEncoder
from stable_audio_lite.data.latents import encoder_hash
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.diffusion.samplers import SAMPLERS, ItemNoise
from stable_audio_lite.diffusion.schedule import polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder, save_tensors
from stable_audio_lite.lora import merge_lora
from stable_audio_lite.models.clap import load_tokenizer
from stable_audio_lite.models.unet import UNet
from stable_audio_lite.models.vae import VAE
from stable_audio_lite.nn.attention import Condition

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_M = TypeVar("_M", bound=nn.Module)

# Latent frames decoded beyond the wanted end, more than the decoder's reach, so that trimming changes no sample.
_DECODE_MARGIN = 16


@dataclass(frozen=True)
class Generated:
    """What `StableAudio.generate` made.

    Attributes:
        audio: (B, 2, T) float32 on the CPU; full scale is 1 and may be exceeded, `save` attenuates then.
        sample_rate: Hz.
        settings: per item, everything that made it: prompt, seed, seconds, steps, model hash, ...
    """

    audio: Tensor
    sample_rate: int
    settings: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Length of each item."""
        return self.audio.shape[-1] / self.sample_rate

    @property
    def seeds(self) -> list[int]:
        """The seed of each item."""
        return [settings["seed"] for settings in self.settings]

    def save(self, path: str | Path, index: int = 0) -> float:
        """Write item `index` as WAV or FLAC with its settings inside; returns the gain applied (1 unless it clipped).

        Raises:
            UserError: as `stable_audio_lite.audio.io.write_audio`.
        """
        return write_audio(path, self.audio[index], self.sample_rate, self.settings[index])


class StableAudio:
    """A loaded bundle, ready to generate; build it with `from_pretrained`."""

    def __init__(
        self,
        folder: Path,
        config: StableAudioConfig,
        *,
        vae: VAE,
        text_encoder: TextEncoder,
        conditioner: Conditioner,
        unet: UNet,
        lora: dict[str, Any] | None = None,
    ):
        """Take loaded parts of the bundle `folder`; `lora` says what was merged into the U-Net."""
        self.folder, self.config = folder, config
        self.vae, self.text_encoder, self.conditioner, self.unet = vae, text_encoder, conditioner, unet
        self.latent_mean = unet.latent_mean.float()[:, None]  # C, 1
        self.latent_std = unet.latent_std.float()[:, None]
        self.hash = bundle.model_hash(folder)
        self.lora = lora or {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        lora: str | Path | None = None,
        lora_strength: float = 1.0,
    ) -> StableAudio:
        """Load a bundle for inference.

        Args:
            name: "starter", a folder, or a Hugging Face hub id.
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: of the VAE's and U-Net's weights and activations; None or "auto" is bfloat16 where the processor
                multiplies it in hardware and float32 elsewhere. The text encoder stays float32.
            lora: folder with a LoRA that training.train_diffusion made for this model; it is merged into the U-Net.
            lora_strength: 1 is as trained, 0 without.

        Raises:
            UserError: there is no such bundle, LoRA or device, or a file is damaged or doesn't fit.
        """
        folder = bundle.resolve(name)
        config = bundle.load_model_config(folder)
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        vae = _load(folder, "vae", lambda: VAE(config.vae)).float().prepare_for_inference()
        unet = _load(folder, "unet", lambda: bundle.build_unet(config))
        merged = None
        if lora is not None:
            latents = encoder_hash(bundle.read_part(folder, "vae"), config.vae.slow_channels)
            merge_lora(unet.float(), lora, latents, lora_strength)
            merged = {"lora": str(lora), "lora_strength": lora_strength}
        conditioner = _load(folder, "conditioner", lambda: Conditioner(config.timing, config.context_width)).float()
        tokenizer = _tokenizer(folder, config)
        text_encoder = _load(folder, "text_encoder", lambda: TextEncoder(config.clap, tokenizer)).float()
        model = cls(folder, config, vae=vae, text_encoder=text_encoder, conditioner=conditioner, unet=unet, lora=merged)
        return model.to(where, kind)

    def to(self, device: torch.device, dtype: torch.dtype) -> StableAudio:
        """Move to `device`, the VAE and the U-Net in `dtype`; returns self."""
        self.vae.to(device, dtype)
        self.unet.to(device, dtype)
        self.conditioner.to(device)
        self.text_encoder.to(device)
        self.latent_mean, self.latent_std = self.latent_mean.to(device), self.latent_std.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.unet.null.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's floating type."""
        return self.unet.null.dtype

    @torch.no_grad()  # rather than inference mode, whose tensors can't be worked on any further
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seconds: float | None = None,
        seconds_start: float = 0.0,
        seconds_total: float | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        rescale: float | None = None,
        negative: str | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        count: int = 1,
        batch: int = 4,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """Make `count` sounds for each prompt; None stands for the bundle's own default.

        Args:
            prompts: one or several descriptions.
            seconds: length of the sound, at most the window (`config.window_seconds`), which is the default.
            seconds_start: where in the described piece the sound begins, in seconds.
            seconds_total: length of the described piece; None: it ends with the sound.
            steps: sampling steps.
            cfg: guidance scale; 1 is none, and twice as fast.
            rescale: 0..1, pulls a strong guidance back to the unguided level.
            negative: what not to hear; takes the place of the learned null in guidance.
            sampler: dpmpp-2m, dpmpp-2m-sde or dpmpp-3m-sde.
            seed: of the first item, each further one has the next; None draws one (see `Generated.seeds`).
            count: sounds per prompt, which lie next to each other in the result.
            batch: sounds sampled at once; more need more memory.
            progress: called with (steps done, steps in all) after each step.

        Raises:
            UserError: a prompt is empty, or a setting is out of range.
        """
        defaults = self.config.generation
        request = _Request(
            seconds=self.config.window_seconds if seconds is None else seconds,
            start=seconds_start,
            total=seconds_total,
            steps=defaults.steps if steps is None else steps,
            cfg=defaults.cfg if cfg is None else cfg,
            rescale=defaults.rescale if rescale is None else rescale,
            negative=negative,
            sampler=sampler or defaults.sampler,
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._check(texts, request, count, batch)
        first = secrets.randbelow(2**31) if seed is None else seed
        if not 0 <= first < 2**63 - len(texts) * count:
            raise UserError(f"seed must lie in 0..2^63, got {seed}")
        items = [(text, first + i) for i, text in enumerate(t for t in texts for _ in range(count))]
        report = _Report(progress, math.ceil(len(items) / batch) * request.steps)
        audio = [
            self._decode(latents, request.seconds)
            for i in range(0, len(items), batch)
            for latents in self._sample(items[i : i + batch], request, report)
        ]
        settings = [self._settings(text, own_seed, request) for text, own_seed in items]
        return Generated(torch.stack(audio), self.config.sample_rate, settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the bundle that this model was loaded from to `folder`, byte for byte; returns `folder`.

        Where a LoRA was merged, the U-Net is written with it, in the floating type that it has here.

        Raises:
            UserError: `folder` holds something other than a bundle, or can't be written.
        """
        target = Path(folder)
        if target.exists() and target.samefile(self.folder):
            if self.lora:
                raise UserError(f"{target}: holds the model without its LoRA; choose another folder")
            return target
        bundle.check_replaceable(target)
        with replacing_folder(target) as temporary:
            for file in sorted(self.folder.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    shutil.copyfile(file, temporary / file.name)
            if self.lora:
                save_tensors(bundle.part_path(temporary, "unet"), self.unet.state_dict(), {"format": "pt"})
        return target

    def push_to_hub(self, repo_id: str, private: bool = True) -> str:
        """Upload the bundle to the Hugging Face hub, creating the repository if need be; returns its address.

        Raises:
            UserError: not logged in, no permission, or no connection.
        """
        if self.lora:
            raise UserError("a LoRA was merged: save_pretrained to a folder and upload that")
        import huggingface_hub

        hub = huggingface_hub.HfApi()
        try:
            hub.create_repo(repo_id, private=private, exist_ok=True)
            allowed = list(bundle.FILES)
            hub.upload_folder(
                repo_id=repo_id, folder_path=self.folder, allow_patterns=allowed, commit_message="Upload a bundle"
            )
        except Exception as error:  # of the hub, or of whichever client it reaches the network by
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{repo_id}: can't be uploaded, log in with 'hf auth login' ({reason})") from error
        return f"https://huggingface.co/{repo_id}"

    def _check(self, texts: list[str], request: _Request, count: int, batch: int) -> None:
        if not texts or not all(text.strip() for text in texts):
            raise UserError("a prompt is empty; say what you want to hear")
        for text in (*texts, request.negative or ""):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"the prompt {text!r} is not valid UTF-8 text; type it again") from error
        if count < 1 or batch < 1 or request.steps < 1:
            raise UserError(f"count, batch and steps must be at least 1, got {count}, {batch} and {request.steps}")
        if request.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler '{request.sampler}'; choose one of {', '.join(SAMPLERS)}")
        if not (math.isfinite(request.cfg) and 0 <= request.rescale <= 1):
            raise UserError(f"cfg must be finite and rescale in 0..1, got {request.cfg} and {request.rescale}")
        window = self.config.window_seconds
        if not 0.5 / self.config.sample_rate < request.seconds <= window:
            raise UserError(
                f"seconds must lie above 0 and at most {math.floor(window * 1000) / 1000}, the window of this model, "
                f"got {request.seconds}"
            )
        longest = self.config.timing.max_seconds
        if not 0 <= request.start <= request.seconds_total <= longest:
            raise UserError(
                f"expected 0 <= seconds_start <= seconds_total <= {longest}, "
                f"got {request.start} and {request.seconds_total}"
            )

    def _sample(self, items: list[tuple[str, int]], request: _Request, report: _Report) -> Tensor:
        """Latents (B, C, F) in the VAE's scale."""
        texts = [text for text, _ in items]
        condition = self._condition(texts, request)
        negative = None if request.negative is None else self._condition([request.negative] * len(texts), request)
        denoiser = Guidance(self.unet, condition, negative, scale=request.cfg, rescale=request.rescale)
        defaults = self.config.generation
        sigmas = polyexponential_sigmas(request.steps, defaults.sigma_min, defaults.sigma_max, defaults.rho)
        noise = ItemNoise([seed for _, seed in items], self.config.latent_shape, self.device)
        solve = SAMPLERS[request.sampler]
        latents = solve(denoiser, noise() * sigmas[0], sigmas, noise=noise, on_step=report.step)
        return latents * self.latent_std + self.latent_mean

    def _condition(self, texts: list[str], request: _Request) -> Condition:
        size = len(texts)
        start = torch.full((size,), request.start)
        total = torch.full((size,), request.seconds_total)
        return self.conditioner(self.text_encoder.encode(texts), start, total)

    def _decode(self, latents: Tensor, seconds: float) -> Tensor:
        """(C, F) latents -> (2, T) float32, T = round(seconds * sample_rate); frames that lie beyond aren't decoded."""
        samples = round(seconds * self.config.sample_rate)
        frames = math.ceil(samples / self.config.hop) + _DECODE_MARGIN
        return self.vae.decode_chunked(latents[None, :, :frames])[0, :, :samples].float().cpu()

    def _settings(self, text: str, seed: int, request: _Request) -> dict[str, Any]:
        defaults = self.config.generation
        return {
            "prompt": text,
            "seed": seed,
            "seconds": request.seconds,
            "seconds_start": request.start,
            "seconds_total": request.seconds_total,
            "steps": request.steps,
            "cfg": request.cfg,
            "rescale": request.rescale,
            "negative": request.negative,
            "sampler": request.sampler,
            "sigma_min": defaults.sigma_min,
            "sigma_max": defaults.sigma_max,
            "rho": defaults.rho,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": self.hash,
            **self.lora,
        }


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The settings that the items of one call share."""

    seconds: float
    start: float
    total: float | None
    steps: int
    cfg: float
    rescale: float
    negative: str | None
    sampler: str

    @property
    def seconds_total(self) -> float:
        return self.start + self.seconds if self.total is None else self.total


class _Report:
    """Counts sampling steps over all batches for a progress callback."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _tokenizer(folder: Path, config: StableAudioConfig) -> Tokenizer:
    path = folder / bundle.TOKENIZER_FILE
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab_size() > config.clap.vocab_size:
        raise UserError(
            f"{path}: knows {tokenizer.get_vocab_size()} tokens, but clap.vocab_size is {config.clap.vocab_size}; "
            "use the tokenizer that the text encoder was trained with"
        )
    return tokenizer


def _load(folder: Path, name: str, build: Callable[[], _M]) -> _M:
    with bundle.WithoutInitialisation():
        module = build()
    bundle.load_part(folder, name, module, assign=True)
    return module.eval().requires_grad_(False)
