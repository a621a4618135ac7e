"""Generation of sound from prompts with a bundle of any system: encode the prompts, sample data, decode them.

    model = StableAudio.from_pretrained("starter")
    result = model.generate(["warm slow piano", "fast techno"], seconds=8, seed=1)
    result.audio  # (2, 2, 8 * 44100) float32: item, channel, sample; full scale is 1

Same prompt, settings, seed and model give the same sound, alone or in a batch (to rounding), on one machine and dtype.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from stable_audio_lite import bundle
from stable_audio_lite.clap.checkpoints import load_text_encoder
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.diffusion.denoiser import Guidance, NetworkDenoiser
from stable_audio_lite.diffusion.samplers import SAMPLERS, Denoiser, ItemNoise, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder, save_tensors
from stable_audio_lite.lora import merge_lora
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.representation import Representation, load_representation
from stable_audio_lite.request import (
    PROMPT_SETTINGS,
    Generated,
    Limits,
    Request,
    check_texts,
    choose_seed,
    make_request,
)
from stable_audio_lite.systems import ComplexSTFTConfig, StableAudioConfig, SystemConfig, load_system

__all__ = ["Generated", "StableAudio"]

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each sampling step."""


class StableAudio:
    """A loaded bundle of any system, ready to generate; build it with `from_pretrained`.

    Attributes:
        folder: of the bundle.
        config: of the system.
        representation: between sound and the data that are sampled.
        network: denoises the data.
        text_encoder, conditioner: of prompts and timing; None where the network takes no prompts.
        lora: settings of the LoRA that was merged into the network, if any.
        hash: identifies the bundle's contents.
    """

    def __init__(
        self,
        folder: Path,
        config: SystemConfig,
        representation: Representation,
        network: nn.Module,
        text_encoder: TextEncoder | None = None,
        conditioner: Conditioner | None = None,
        lora: dict[str, Any] | None = None,
    ):
        """Take the loaded parts of the bundle `folder`."""
        self.folder, self.config, self.representation, self.network = folder, config, representation, network
        self.text_encoder, self.conditioner, self.lora = text_encoder, conditioner, lora or {}
        self.process, self.hash = config.process, bundle.model_hash(folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        lora: str | Path | None = None,
        lora_strength: float = 1.0,
    ) -> Self:
        """Load a bundle for inference.

        Args:
            name: "starter", a folder, or a Hugging Face hub id.
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: of the networks' weights and activations; None or "auto" is bfloat16 where the processor multiplies
                it in hardware and float32 elsewhere. The text encoder stays float32.
            lora: folder with a LoRA that training.train_diffusion made for this model; it is merged into the U-Net.
            lora_strength: 1 is as trained, 0 is none.

        Raises:
            UserError: there is no such bundle, LoRA or device, the LoRA is for another system, or a file is damaged or
                doesn't fit.
        """
        folder = bundle.resolve(name)
        config = load_system(folder)
        if lora is not None and not isinstance(config, StableAudioConfig):
            raise UserError(
                f"{lora}: a LoRA is for a model of kind stable_audio, {name} is {config.kind}; leave it out"
            )
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        representation = load_representation(folder, config)
        network, merged = bundle.load_module(folder, config.part, config.network), None
        if lora is not None:
            merge_lora(network.float(), lora, representation.hash, lora_strength)
            merged = {"lora": str(lora), "lora_strength": lora_strength}
        text_encoder = conditioner = None
        if not isinstance(config, ComplexSTFTConfig) and config.clap is not None:
            timing, width = config.timing, config.clap.text_width
            text_encoder = load_text_encoder(folder, config.clap)
            conditioner = bundle.load_module(folder, "conditioner", lambda: Conditioner(timing, width)).float()
        model = cls(folder, config, representation, network, text_encoder, conditioner, merged)
        return model.to(where, kind)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to `device`, the VAE and the network in `dtype`; returns self."""
        self.representation.to(device, dtype)
        self.network.to(device, dtype)
        for part in (self.text_encoder, self.conditioner):
            if part is not None:
                part.to(device)
        return self

    def with_defaults(self, **settings: Any) -> StableAudio:
        """Return a model with the same weights and other defaults (`stable_audio_lite.systems.GenerationDefaults`).

        Raises:
            UserError: a value is out of range.
        """
        try:
            config = replace(self.config, generation=replace(self.config.generation, **settings))
        except ValueError as error:
            raise UserError(str(error)) from error
        parts = (self.representation, self.network, self.text_encoder, self.conditioner, self.lora)
        return StableAudio(self.folder, config, *parts)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.representation.sample_rate

    @property
    def window_seconds(self) -> float:
        """Length in seconds of the longest sound that it generates."""
        return self.representation.window_seconds

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the network."""
        return next(self.network.parameters()).dtype

    @torch.no_grad()  # not inference mode, whose tensors can't be modified or differentiated later
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
        progress: Progress | None = None,
    ) -> Generated:
        """Generate `count` sounds for each prompt; None stands for the bundle's own default.

        Args:
            prompts: one or several descriptions; None generates without a prompt, and without the settings that go with
                one (seconds_start, seconds_total, cfg, rescale, negative).
            seconds: length of the sound, at most the window (`window_seconds`), which is the default.
            seconds_start: where in the described piece the sound begins, in seconds; 0 by default.
            seconds_total: length of the described piece; None: it ends with the sound.
            steps: sampling steps.
            cfg: guidance scale; 1 is no guidance, and twice as fast.
            rescale: 0..1, how far guidance is pulled back to the unguided standard deviation.
            negative: prompt to steer away from; replaces the learned null in guidance.
            sampler: one of `stable_audio_lite.diffusion.samplers.SAMPLERS`.
            seed: of the first item; each further item has the next one. None draws one (see `Generated.seeds`).
            count: sounds per prompt, adjacent in the result.
            batch: sounds sampled at once; more need more memory.
            progress: called with (steps done, steps in all) after each step.

        Raises:
            UserError: a prompt is empty, the network takes no prompts, or a setting is out of range.
        """
        if count < 1 or batch < 1:
            raise UserError(f"count and batch must be at least 1, got {count} and {batch}")
        about = (seconds_start, seconds_total, cfg, rescale, negative)
        self._check_text(prompts, dict(zip(PROMPT_SETTINGS, about, strict=True)))
        request = make_request(
            self.config.generation,
            Limits(self.sample_rate, self.window_seconds, *self._longest()),
            seconds=seconds,
            seconds_start=seconds_start,
            seconds_total=seconds_total,
            steps=steps,
            cfg=cfg,
            rescale=rescale,
            negative=negative,
            sampler=sampler,
        )
        texts = [prompts] if prompts is None or isinstance(prompts, str) else list(prompts)
        check_texts(texts, negative)
        first = choose_seed(seed, len(texts) * count)
        items = [(text, first + i) for i, text in enumerate(t for t in texts for _ in range(count))]
        step = _counter(progress, math.ceil(len(items) / batch) * request.steps)
        samples = round(request.seconds * self.sample_rate)
        audio = [
            self.representation.decode(x[None], samples)[0].cpu()
            for i in range(0, len(items), batch)
            for x in self._sample(items[i : i + batch], request, step)
        ]
        settings = [self._settings(text, own_seed, request) for text, own_seed in items]
        return Generated(torch.stack(audio), self.sample_rate, settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the bundle that this model was loaded from to `folder`, byte for byte; returns `folder`.

        If a LoRA was merged, the network is written with it, in its present floating type.

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
        """Upload the bundle to the Hugging Face hub, creating the repository if it doesn't exist; returns its address.

        Raises:
            UserError: not logged in, no permission, or no connection.
        """
        if self.lora:
            raise UserError("a LoRA was merged: save_pretrained to a folder and upload that")
        return bundle.upload(self.folder, repo_id, private)

    def _longest(self) -> tuple[float, ...]:
        return (float(self.conditioner.config.max_seconds),) if self.conditioner else ()

    def _check_text(self, prompts: str | Sequence[str] | None, about_prompts: dict[str, Any]) -> None:
        given = next((name for name, value in about_prompts.items() if value is not None), None)
        if self.conditioner is None and (prompts is not None or given):
            raise UserError(f"this model reads no text; leave out {'the prompt' if prompts is not None else given}")
        if prompts is None and given:
            raise UserError(f"{given} says something about a prompt; give one, or leave {given} out")

    def _sample(self, items: list[tuple[str | None, int]], request: Request, on_step: Callable[[], None]) -> Tensor:
        """Sample normalised data (B, *shape) for (prompt, seed) items."""
        denoiser = self._denoiser([text for text, _ in items], request)
        defaults = self.config.generation
        sigmas = polyexponential_sigmas(request.steps, defaults.sigma_min, defaults.sigma_max, defaults.rho)
        noise = ItemNoise([seed for _, seed in items], self.representation.shape, self.device, self._frames(request))
        solve = SAMPLERS[request.sampler]
        return solve(denoiser, noise() * sigmas[0], sigmas, noise=noise, on_step=on_step)

    def _frames(self, request: Request) -> int:
        """Frames to sample: those asked for and a margin where the network knows such windows, else all."""
        window, margin = self.representation.shape[-1], self.config.generation.margin
        if margin is None:
            return window
        return min(math.ceil(request.seconds * self.sample_rate / self.representation.hop) + margin, window)

    def _denoiser(self, texts: list[str | None], request: Request) -> Denoiser:
        network: Any = self.network
        if self.conditioner is None:
            return NetworkDenoiser(network, self.process)
        if None in texts:
            return Guidance(network, self.process, network.null_condition(len(texts)), scale=1.0)
        condition, negative = self._condition([text or "" for text in texts], request), None
        if request.negative is not None:
            negative = self._condition([request.negative] * len(texts), request)
        return Guidance(network, self.process, condition, negative, scale=request.cfg, rescale=request.rescale)

    def _condition(self, texts: list[str], request: Request) -> Condition:
        assert self.text_encoder is not None and self.conditioner is not None
        start, total = (torch.full((len(texts),), value) for value in (request.start, request.total))
        return self.conditioner(self.text_encoder.encode(texts), start, total)

    def _settings(self, text: str | None, seed: int, request: Request) -> dict[str, Any]:
        defaults = self.config.generation
        settings = {
            "prompt": text,
            "seed": seed,
            "seconds": request.seconds,
            "seconds_start": request.start,
            "seconds_total": request.total,
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
        return (
            settings
            if text is not None
            else {k: v for k, v in settings.items() if k not in ("prompt", *PROMPT_SETTINGS)}
        )


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Count sampling steps over all batches for a progress callback."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step
