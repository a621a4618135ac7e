"""What all pipelines share: requests, seeds and batches, conditions, guidance, sampling, settings, copies of a bundle.

A pipeline is a loaded bundle that generates. `stable_audio_lite.pipeline` and `stable_audio_lite.spectral` have one
each; they say what is sampled and how it becomes sound.
"""

from __future__ import annotations

import math
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stable_audio_lite import bundle
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.clap.checkpoints import load_text_encoder
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.diffusion.denoiser import Guidance, NetworkDenoiser, Objective
from stable_audio_lite.diffusion.samplers import SAMPLERS, Denoiser, ItemNoise
from stable_audio_lite.diffusion.schedule import polyexponential_sigmas, sigma_to_t
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder, save_tensors
from stable_audio_lite.models.conditioner import Conditioner, TimingConfig
from stable_audio_lite.nn.attention import Condition

_M = TypeVar("_M", bound=nn.Module)
_WITH_PROMPT = ("prompt", "seconds_start", "seconds_total", "cfg", "rescale", "negative")


@dataclass(frozen=True)
class Generated:
    """What a pipeline made.

    Attributes:
        audio: (B, C, T) float32 on the CPU, C = 2 or 1; full scale is 1 and may be exceeded, `save` attenuates then.
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


class Pipeline(ABC):
    """A loaded bundle, ready to generate.

    Attributes:
        objective: what the network predicts.
        text_encoder, conditioner: what prompts and timing go through, None where the network reads none.
        lora: what was merged into the network, which is a U-Net then.
    """

    objective: Objective = "v"

    def __init__(
        self,
        folder: Path,
        config: Any,
        network: nn.Module,
        text_encoder: TextEncoder | None,
        conditioner: Conditioner | None,
        lora: dict[str, Any] | None = None,
    ):
        """Take the loaded parts of the bundle `folder`."""
        self.folder, self.config, self.network = folder, config, network
        self.text_encoder, self.conditioner = text_encoder, conditioner
        self.hash = bundle.model_hash(folder)
        self.lora = lora or {}

    @property
    @abstractmethod
    def sample_rate(self) -> int:
        """Hz."""

    @property
    @abstractmethod
    def window_seconds(self) -> float:
        """The longest sound that it generates."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one item as it is sampled."""

    @abstractmethod
    def _decode(self, x: Tensor, seconds: float) -> Tensor:
        """A sampled item -> (C, T) float32 on the CPU, T = round(seconds * sample_rate)."""

    def _time(self, sigma: Tensor) -> Tensor:
        """The times that the network was trained with for noise levels (B,)."""
        return sigma_to_t(sigma)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating type."""
        return next(self.network.parameters()).dtype

    @torch.no_grad()  # rather than inference mode, whose tensors can't be worked on any further
    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        seconds: float | None = None,
        seconds_start: float | None = None,
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
            prompts: one or several descriptions; None for any sound, which takes no settings of prompts either
                (seconds_start, seconds_total, cfg, rescale, negative).
            seconds: length of the sound, at most the window (`window_seconds`), which is the default.
            seconds_start: where in the described piece the sound begins, in seconds; 0 by default.
            seconds_total: length of the described piece; None: it ends with the sound.
            steps: sampling steps.
            cfg: guidance scale; 1 is none, and twice as fast.
            rescale: 0..1, pulls a strong guidance back to the unguided level.
            negative: what not to hear; takes the place of the learned null in guidance.
            sampler: one of `stable_audio_lite.diffusion.samplers.SAMPLERS`.
            seed: of the first item, each further one has the next; None draws one (see `Generated.seeds`).
            count: sounds per prompt, which lie next to each other in the result.
            batch: sounds sampled at once; more need more memory.
            progress: called with (steps done, steps in all) after each step.

        Raises:
            UserError: a prompt is empty or the network reads none, or a setting is out of range.
        """
        about_prompts = (seconds_start, seconds_total, cfg, rescale, negative)
        self._check_text(prompts, dict(zip(_WITH_PROMPT[1:], about_prompts, strict=True)))
        defaults = self.config.generation
        request = _Request(
            seconds=self.window_seconds if seconds is None else seconds,
            start=0.0 if seconds_start is None else seconds_start,
            total=seconds_total,
            steps=defaults.steps if steps is None else steps,
            cfg=defaults.cfg if cfg is None else cfg,
            rescale=defaults.rescale if rescale is None else rescale,
            negative=negative,
            sampler=sampler or defaults.sampler,
        )
        texts = [prompts] if prompts is None or isinstance(prompts, str) else list(prompts)
        self._check(texts, request, count, batch)
        first = secrets.randbelow(2**31) if seed is None else seed
        if not 0 <= first < 2**63 - len(texts) * count:
            raise UserError(f"seed must lie in 0..2^63, got {seed}")
        items = [(text, first + i) for i, text in enumerate(t for t in texts for _ in range(count))]
        report = _Report(progress, math.ceil(len(items) / batch) * request.steps)
        audio = [
            self._decode(x, request.seconds)
            for i in range(0, len(items), batch)
            for x in self._sample(items[i : i + batch], request, report)
        ]
        settings = [self._settings(text, own_seed, request) for text, own_seed in items]
        return Generated(torch.stack(audio), self.sample_rate, settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the bundle that this model was loaded from to `folder`, byte for byte; returns `folder`.

        Where a LoRA was merged, the network is written with it, in the floating type that it has here.

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
                save_tensors(bundle.part_path(temporary, "unet"), self.network.state_dict(), {"format": "pt"})
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

    def _check_text(self, prompts: str | Sequence[str] | None, about_prompts: dict[str, Any]) -> None:
        given = next((name for name, value in about_prompts.items() if value is not None), None)
        if self.conditioner is None and (prompts is not None or given):
            raise UserError(f"this model reads no text; leave out {'the prompt' if prompts is not None else given}")
        if prompts is None and given:
            raise UserError(f"{given} says something about a prompt; give one, or leave {given} out")

    def _check(self, texts: Sequence[str | None], request: _Request, count: int, batch: int) -> None:
        if not texts or not all(text is None or text.strip() for text in texts):
            raise UserError("a prompt is empty; say what you want to hear")
        for text in (*texts, request.negative):
            try:
                (text or "").encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"the prompt {text!r} is not valid UTF-8 text; type it again") from error
        if count < 1 or batch < 1 or request.steps < 1:
            raise UserError(f"count, batch and steps must be at least 1, got {count}, {batch} and {request.steps}")
        if request.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler '{request.sampler}'; choose one of {', '.join(SAMPLERS)}")
        if not (math.isfinite(request.cfg) and 0 <= request.rescale <= 1):
            raise UserError(f"cfg must be finite and rescale in 0..1, got {request.cfg} and {request.rescale}")
        window = self.window_seconds
        if not 0.5 / self.sample_rate < request.seconds <= window:
            raise UserError(
                f"seconds must lie above 0 and at most {math.floor(window * 1000) / 1000}, the window of this model, "
                f"got {request.seconds}"
            )
        longest = self.conditioner.config.max_seconds if self.conditioner else math.inf
        if not 0 <= request.start <= request.seconds_total <= longest:
            raise UserError(
                f"expected 0 <= seconds_start <= seconds_total <= {longest}, "
                f"got {request.start} and {request.seconds_total}"
            )

    def _sample(self, items: list[tuple[str | None, int]], request: _Request, report: _Report) -> Tensor:
        """Items (B, *shape) as the network learned them."""
        denoiser = self._denoiser([text for text, _ in items], request)
        defaults = self.config.generation
        sigmas = polyexponential_sigmas(request.steps, defaults.sigma_min, defaults.sigma_max, defaults.rho)
        noise = ItemNoise([seed for _, seed in items], self.shape, self.device)
        solve = SAMPLERS[request.sampler]
        return solve(denoiser, noise() * sigmas[0], sigmas, noise=noise, on_step=report.step)

    def _denoiser(self, texts: list[str | None], request: _Request) -> Denoiser:
        network: Any = self.network
        if self.conditioner is None:
            return NetworkDenoiser(network, None, self.objective, self._time)
        scale, rescale, negative = request.cfg, request.rescale, None
        if None in texts:
            condition, scale, rescale = network.null_condition(len(texts)), 1.0, 0.0
        else:
            condition = self._condition([text or "" for text in texts], request)
            if request.negative is not None:
                negative = self._condition([request.negative] * len(texts), request)
        return Guidance(
            network, condition, negative, scale=scale, rescale=rescale, objective=self.objective, time=self._time
        )

    def _condition(self, texts: list[str], request: _Request) -> Condition:
        assert self.text_encoder is not None and self.conditioner is not None
        size = len(texts)
        start = torch.full((size,), request.start)
        total = torch.full((size,), request.seconds_total)
        return self.conditioner(self.text_encoder.encode(texts), start, total)

    def _settings(self, text: str | None, seed: int, request: _Request) -> dict[str, Any]:
        defaults = self.config.generation
        settings = {
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
        return settings if text is not None else {k: v for k, v in settings.items() if k not in _WITH_PROMPT}


def load_part(folder: Path, name: str, build: Callable[[], _M]) -> _M:
    """One part of a bundle, ready for inference, in the floating type of its file."""
    with bundle.WithoutInitialisation():
        module = build()
    bundle.load_part(folder, name, module, assign=True)
    return module.eval().requires_grad_(False)


def load_text_parts(folder: Path, clap: ClapConfig, timing: TimingConfig) -> tuple[TextEncoder, Conditioner]:
    """What a bundle's prompts and timing go through, in float32.

    Raises:
        UserError: a file is missing or damaged, or doesn't fit.
    """
    conditioner = load_part(folder, "conditioner", lambda: Conditioner(timing, clap.text_width)).float()
    return load_text_encoder(folder, clap), conditioner
