"""Generation of sound from prompts with a bundle of any system: encode the prompts, sample data, decode them.

    model = StableAudio.from_pretrained("starter")
    result = model.generate(["warm slow piano", "fast techno"], seconds=8, seed=1)
    result.audio  # (2, 2, 8 * 44100) float32: item, channel, sample; full scale is 1

Same prompt, settings, seed and model give the same sound, alone or in a batch (to rounding), on one machine and dtype.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from stable_audio_lite import bundle
from stable_audio_lite.clap.checkpoints import load_text_encoder
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.diffusion.denoiser import Guidance, NetworkDenoiser
from stable_audio_lite.diffusion.editing import KnownRegion
from stable_audio_lite.diffusion.replay import Recorder
from stable_audio_lite.diffusion.samplers import SAMPLERS, Denoiser, ItemNoise
from stable_audio_lite.edits import CROSSFADE_SECONDS, After, Edit, Sampling, Sound, plan_windows, steps_around
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder, save_tensors
from stable_audio_lite.lora import merge_lora
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.representation import (
    LatentRepresentation,
    Representation,
    load_representation,
    outline_representation,
)
from stable_audio_lite.request import (
    PROMPT_SETTINGS,
    Extension,
    Generated,
    Limits,
    Request,
    check_number,
    check_texts,
    choose_seed,
    list_prompts,
    make_request,
)
from stable_audio_lite.systems import ComplexSTFTConfig, StableAudioConfig, SystemConfig, load_system

__all__ = ["Generated", "Plan", "StableAudio"]

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) after each sampling step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked call of `StableAudio.generate` or `extend`, which `StableAudio.render` carries out.

    Attributes:
        request: settings that all items share.
        items: prompt and seed of each.
        edit: how they are made.
        after: the sound that a single item goes on from.
    """

    request: Request
    items: list[tuple[str | None, int]]
    edit: Edit
    after: Sound | None = None

    def fits(self, other: Plan) -> bool:
        """Tell whether both can be rendered as one, by the request and edit of either."""
        alone = self.after or other.after
        return alone is None and self.request == other.request and self.edit == other.edit


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
        self._recorder = Recorder(network)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        dtype: torch.dtype | str | None = None,
        lora: str | Path | None = None,
        lora_strength: float | None = None,
    ) -> Self:
        """Load a bundle for inference.

        Args:
            name: "starter", a folder, or a Hugging Face hub id.
            device: "auto" (CUDA, then MPS, then CPU) or a torch device.
            dtype: of the networks' weights and activations; None or "auto" is bfloat16 where the processor multiplies
                it in hardware and float32 elsewhere. The text encoder stays float32.
            lora: folder with a LoRA that training.train_diffusion made for this model; it is merged into the U-Net.
            lora_strength: of the LoRA; 1 is as trained, the default, and 0 none.

        Raises:
            UserError: there is no such bundle, LoRA or device, the LoRA is for another system, or a file is damaged or
                doesn't fit.
        """
        if lora_strength is not None:
            check_number("lora_strength", lora_strength)
            if lora is None or not math.isfinite(lora_strength):
                raise UserError(f"lora_strength: is the strength of a LoRA, got {lora_strength:g} and lora {lora}")
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
            strength = 1.0 if lora_strength is None else lora_strength
            merge_lora(network.float(), lora, representation.hash, strength)
            merged = {"lora": str(lora), "lora_strength": strength}
        text_encoder = conditioner = None
        if not isinstance(config, ComplexSTFTConfig) and config.clap is not None:
            timing, width = config.timing, config.clap.text_width
            text_encoder = load_text_encoder(folder, config.clap)
            conditioner = bundle.load_module(folder, "conditioner", lambda: Conditioner(timing, width)).float()
        model = cls(folder, config, representation, network, text_encoder, conditioner, merged)
        return model.to(where, kind)

    @classmethod
    def outline(cls, name: str | Path) -> Self:
        """Read a bundle without its weights: it makes plans, for a model that is loaded elsewhere, and no sound.

        Raises:
            UserError: there is no such bundle, its config is wrong, or it has no network.
        """
        folder = bundle.resolve(name)
        config, conditioner = load_system(folder), None
        bundle.check_part(folder, config.part)
        with torch.device("meta"):
            representation = outline_representation(config)
            if not isinstance(config, ComplexSTFTConfig) and config.clap is not None:
                conditioner = Conditioner(config.timing, config.clap.text_width)
        return cls(folder, config, representation, nn.Module(), None, conditioner)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to `device`, the VAE and the network in `dtype`; returns self."""
        self.representation.to(device, dtype)
        self.network.to(device, dtype)
        for part in (self.text_encoder, self.conditioner):
            if part is not None:
                part.to(device)
        self._recorder.refresh()
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
        model = StableAudio(self.folder, config, *parts)
        model._recorder = self._recorder
        return model

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
        edit: Edit | None = None,
        progress: Progress | None = None,
    ) -> Generated:
        """Generate `count` sounds for each prompt; None stands for the bundle's own default.

        Args:
            prompts: one or several descriptions; None generates without a prompt, and without the settings that go with
                one (seconds_start, seconds_total, cfg, rescale, negative), unless `edit` has its own.
            seconds: length of the sound, by default the window (`window_seconds`); what is longer is made in windows
                that go on from one another, as `extend` does.
            seconds_start: where in the described piece the sound begins, in seconds; 0 by default.
            seconds_total: length of the described piece; None: it ends with the sound.
            steps: sampling steps.
            cfg: guidance scale; 1 is no guidance.
            rescale: 0..1, how far guidance is pulled back to the unguided standard deviation of each frame.
            negative: prompt to steer away from; replaces the learned null in guidance.
            sampler: one of `stable_audio_lite.diffusion.samplers.SAMPLERS`.
            seed: of the first item; each further item has the next one. None draws one (see `Generated.seeds`).
            count: sounds per prompt, adjacent in the result.
            batch: sounds sampled at once; more need more memory.
            edit: what to make it from, see `stable_audio_lite.edits`; None: from nothing but the prompt.
            progress: called with (steps done, steps in all) after each step.

        Raises:
            UserError: a prompt is empty, the network takes no prompts, or a setting is out of range.
        """
        _check_positive("batch", batch)
        plan = self.plan(
            prompts,
            seconds=seconds,
            seconds_start=seconds_start,
            seconds_total=seconds_total,
            steps=steps,
            cfg=cfg,
            rescale=rescale,
            negative=negative,
            sampler=sampler,
            seed=seed,
            count=count,
            edit=edit,
        )
        items: list[list[Tensor]] = [[] for _ in plan.items]
        for item, piece in self.render(plan, batch, progress):
            items[item].append(piece)
        return Generated(torch.stack([torch.cat(pieces, 1) for pieces in items]), self.sample_rate, self.settings(plan))

    def plan(
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
        edit: Edit | None = None,
    ) -> Plan:
        """Check what `generate` takes, by the same names, without computing anything.

        Raises:
            UserError: as `generate`.
        """
        _check_positive("count", count)
        if not isinstance(edit := edit or Edit(), Edit):
            raise UserError(f"edit must be one of stable_audio_lite.edits, got {edit!r}")
        if seconds is not None:
            check_number("seconds", seconds)
        prompts = edit.prompt if prompts is None and self.conditioner else prompts
        about = (seconds_start, seconds_total, cfg, rescale, negative)
        self._check_text(prompts, dict(zip(PROMPT_SETTINGS, about, strict=True)))
        request = make_request(
            self.config.generation,
            self._limits(edit),
            seconds=edit.seconds(self.representation, seconds),
            seconds_start=seconds_start,
            seconds_total=seconds_total,
            timing=edit.timing,
            steps=steps,
            cfg=cfg,
            rescale=rescale,
            negative=negative,
            sampler=sampler,
        )
        texts = list_prompts(prompts)
        check_texts(texts, negative)
        first = choose_seed(seed, len(texts) * count)
        items = [(text, first + i) for i, text in enumerate(t for t in texts for _ in range(count))]
        return Plan(request=request, items=items, edit=edit)

    @torch.no_grad()
    def render(self, plan: Plan, batch: int = 4, progress: Progress | None = None) -> Iterator[tuple[int, Tensor]]:
        """Make the sounds of a plan and yield them as they are decoded: an item's number, and what follows of it.

        Args:
            plan: from `plan` or `plan_extension`; those of equal requests and edits can be joined.
            batch: sounds sampled at once.
            progress: called with (steps done, steps in all) after each step; what it raises ends the work.

        Yields:
            Number of an item and the next (C, any) of its sound, float32 on the CPU. A sound within the model's window
            is complete before the next one begins.

        Raises:
            UserError: as `generate`.
        """
        request, edit = plan.request, plan.edit
        held = None if plan.after is None else self._held(plan.after)
        batches = [range(i, min(i + batch, len(plan.items))) for i in range(0, len(plan.items), batch)]
        if held is not None or request.seconds > self.window_seconds:
            windows = self._windows(request, 0 if held is None else held.data.shape[-1])
            step = _counter(progress, len(batches) * _steps_of(windows, request))
            for part in batches:
                for piece in self._extended([plan.items[i] for i in part], request, windows, held, step):
                    yield from zip(part, piece.cpu(), strict=True)
            return
        step = _counter(progress, len(batches) * edit.steps(request.steps))
        samples = round(request.seconds * self.sample_rate)
        silent = self._silence() if type(edit) is Edit else None
        # What of the sound follows the described piece is silence, and needn't be sampled.
        frames = self._frames(edit, request, samples if silent is None else 1)
        for part in batches:
            sampling = self._sampling([plan.items[i] for i in part], request, frames, step)
            for i, x in zip(part, edit.sample(self.representation, sampling), strict=True):
                for piece in edit.decode_stream(self.representation, _padded(x[None], silent), samples):
                    yield i, piece[0].cpu()

    def remarks(self, texts: Sequence[str]) -> list[str]:
        """Say what the model won't read of prompts, or doesn't know."""
        if (encoder := self.text_encoder) is None:
            return []
        return [f"{text[:40]!r}: {remark}" for text in dict.fromkeys(texts) for remark in encoder.remarks(text)]

    def settings(self, plan: Plan) -> list[dict[str, Any]]:
        """List everything needed to make each item of a plan again: prompt, seed, seconds, steps, model hash, ..."""
        more = plan.edit.settings | ({} if plan.after is None else {"continues": plan.after.name})
        return [self._settings(text, seed, plan.request) | more for text, seed in plan.items]

    @torch.no_grad()
    def extend(
        self,
        prompt: str | None = None,
        *,
        seconds: float,
        after: Sound | None = None,
        seconds_start: float | None = None,
        seconds_total: float | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        rescale: float | None = None,
        negative: str | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        progress: Progress | None = None,
    ) -> Extension:
        """Generate sound of any length, or what follows a sound, piece by piece, in constant memory.

        Windows overlap by up to a half; each is sampled with what is there already held fixed.

        Args:
            prompt: what to hear; None: that of `after`, or none.
            seconds: length to generate.
            after: the sound that it follows, or the last `window_seconds` of it.
            seconds_start: where in the described piece the new sound begins; by default where `after` ends.
            seconds_total: length of the described piece; None: it ends with the sound.
            steps, cfg, rescale, negative, sampler, seed, progress: as `generate` takes them.

        Raises:
            UserError: as `generate`, or `after` is silent or shorter than a frame.
        """
        plan = self.plan_extension(
            prompt,
            seconds=seconds,
            after=after,
            seconds_start=seconds_start,
            seconds_total=seconds_total,
            steps=steps,
            cfg=cfg,
            rescale=rescale,
            negative=negative,
            sampler=sampler,
            seed=seed,
        )
        pieces = (piece for _, piece in self.render(plan, progress=progress))
        return Extension(pieces, self.sample_rate, self.settings(plan)[0])

    def plan_extension(
        self,
        prompt: str | None = None,
        *,
        seconds: float,
        after: Sound | None = None,
        seconds_start: float | None = None,
        seconds_total: float | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        rescale: float | None = None,
        negative: str | None = None,
        sampler: str | None = None,
        seed: int | None = None,
    ) -> Plan:
        """Check what `extend` takes, by the same names, without computing anything.

        Raises:
            UserError: as `extend`.
        """
        prompt = after.prompt if prompt is None and after is not None and self.conditioner else prompt
        about = (seconds_start, seconds_total, cfg, rescale, negative)
        self._check_text(prompt, dict(zip(PROMPT_SETTINGS, about, strict=True)))
        if after is not None:
            after.check_audible()
            if after.seconds < (frame := self.representation.hop / self.sample_rate):
                raise UserError(f"{after.name}: too short to go on from; give {frame:.3f} s or more")
        begins = 0.0 if after is None else after.begins + after.seconds
        request = make_request(
            self.config.generation,
            self._limits(Edit()),
            seconds=seconds,
            seconds_start=seconds_start,
            seconds_total=seconds_total,
            timing=lambda length: (begins, begins + length),
            steps=steps,
            cfg=cfg,
            rescale=rescale,
            negative=negative,
            sampler=sampler,
        )
        check_texts([prompt], negative)
        item = (prompt, choose_seed(seed, 1))
        return Plan(request=request, items=[item], edit=Edit(), after=after)

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

    def _limits(self, edit: Edit) -> Limits:
        longest = float(self.conditioner.config.max_seconds) if self.conditioner else math.inf
        most = longest if type(edit) is Edit else self.window_seconds
        return Limits(self.sample_rate, self.window_seconds, most, longest)

    def _check_text(self, prompts: str | Sequence[str] | None, about_prompts: dict[str, Any]) -> None:
        given = next((name for name, value in about_prompts.items() if value is not None), None)
        if self.conditioner is None and (prompts is not None or given):
            raise UserError(f"this model reads no text; leave out {'the prompt' if prompts is not None else given}")
        if prompts is None and given:
            raise UserError(f"{given} says something about a prompt; give one, or leave {given} out")

    def _sampling(
        self,
        items: list[tuple[str | None, int]],
        request: Request,
        frames: int,
        on_step: Callable[[], None],
        noise: ItemNoise | None = None,
    ) -> Sampling:
        """Prepare to sample data for (prompt, seed) items."""
        denoiser, silent = self._denoiser([text for text, _ in items], request), self._silence()
        if silent is not None and (end := self._end_frame(request)) < frames:
            # Timing embeddings say when the piece ends; latents of silence from there on make sure of it.
            denoiser = KnownRegion(denoiser, silent[:, -frames:], torch.arange(frames, device=self.device) >= end)
        return Sampling(
            solve=SAMPLERS[request.sampler],
            denoiser=denoiser,
            noise=noise or self._noise(items, frames),
            steps=request.steps,
            defaults=self.config.generation,
            frames=frames,
            on_step=on_step,
        )

    def _silence(self) -> Tensor | None:
        """Latents (C, window) of the silence after a described piece; None for other systems."""
        if self.conditioner is None or not isinstance(self.representation, LatentRepresentation):
            return None
        return self.representation.silence.to(self.device)

    def _end_frame(self, request: Request) -> int:
        """Frame after the start at which the described piece is over."""
        frames = (request.total - request.start) * self.sample_rate / self.representation.hop
        return max(math.ceil(frames - 1e-6), 1)

    def _frames(self, edit: Edit, request: Request, samples: int) -> int:
        """Frames to sample for so many samples or more from the request's start.

        A window that is shorter than the longest holds the rest of the described piece, as those in training did.
        """
        if self._silence() is not None and type(edit) in (Edit, After):
            samples = max(samples, self._end_frame(request) * self.representation.hop)
        return edit.frames(self.representation, samples, self.config.generation.windows)

    def _noise(self, items: list[tuple[str | None, int]], frames: int | None = None) -> ItemNoise:
        return ItemNoise([seed for _, seed in items], self.representation.shape, self.device, frames)

    def _windows(self, request: Request, known: int) -> list[tuple[int, int]]:
        samples = round(request.seconds * self.sample_rate)
        return plan_windows(samples, self.representation.hop, self.representation.shape[-1], known)

    def _held(self, after: Sound) -> After:
        """Hold the end of a sound, at most half a window of whole frames."""
        hop, audio = self.representation.hop, after.fitted(self.representation)
        frames = min(audio.shape[1] // hop, self.representation.shape[-1] // 2)
        end = audio[None, :, audio.shape[1] - frames * hop :].to(self.device)
        return After(end, self.representation.encode(end).float())

    @torch.no_grad()
    def _extended(
        self,
        items: list[tuple[str | None, int]],
        request: Request,
        windows: list[tuple[int, int]],
        held: After | None,
        on_step: Callable[[], None],
    ) -> Iterator[Tensor]:
        """Yield successive sound (B, channels, any) of `windows` that go on from one another, and from `held`."""
        hop, rate = self.representation.hop, self.sample_rate
        noise, done, fade = self._noise(items), 0, int(CROSSFADE_SECONDS * rate)
        after: Tensor | None = None  # how the last window would go on
        for number, (known, samples) in enumerate(windows):
            edit: Edit = Edit() if held is None else held
            own = replace(request, start=max(request.start + done / rate - known * hop / rate, 0.0))
            noise.frames = frames = self._frames(edit, own, known * hop + samples)
            x = edit.sample(self.representation, self._sampling(items, own, frames, on_step, noise))
            unused = (frames - known) * hop - samples
            more = min(fade, unused) if number + 1 < len(windows) else 0
            sound = edit.decode(self.representation, x, samples + more)
            piece, tail = sound[..., :samples].clone(), sound[..., samples:]
            if after is not None:
                both = min(after.shape[2], samples)
                ramp = torch.linspace(0, 1, both, device=piece.device)
                piece[..., :both] = torch.lerp(after[..., :both], piece[..., :both], ramp)
            yield piece
            if more:
                after, done, keep = tail, done + samples, windows[number + 1][0]
                end = known + samples // hop
                past = piece if held is None else torch.cat((held.audio.to(piece), piece), 2)
                held = After(past[..., past.shape[2] - keep * hop :], x[..., end - keep : end])

    def _denoiser(self, texts: list[str | None], request: Request) -> Denoiser:
        network: Any = self.network
        if self._recorder.network is not network:
            self._recorder = Recorder(network)
        if self.conditioner is None:
            return NetworkDenoiser(network, self.process, recorder=self._recorder)
        frames = request.start * self.sample_rate / self.representation.hop
        start = torch.full((len(texts),), frames, device=self.device)
        if None in texts:
            nothing = network.null_condition(len(texts))
            return Guidance(network, self.process, nothing, scale=1.0, start=start, recorder=self._recorder)
        condition, negative = self._condition([text or "" for text in texts], request), None
        if request.negative is not None:
            negative = self._condition([request.negative] * len(texts), request)
        return Guidance(
            network,
            self.process,
            condition,
            negative,
            scale=request.cfg,
            rescale=request.rescale,
            start=start,
            recorder=self._recorder,
        )

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


def _check_positive(name: str, value: object) -> None:
    check_number(name, value, whole=True)
    if value < 1:  # type: ignore[operator]
        raise UserError(f"{name} must be at least 1, got {value}")


def _steps_of(windows: list[tuple[int, int]], request: Request) -> int:
    """Sampling steps of windows that go on from one another."""
    steps = request.steps
    return sum(steps_around(steps) if known else steps for known, _ in windows)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Count sampling steps over all batches for a progress callback."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


def _padded(x: Tensor, silence: Tensor | None) -> Tensor:
    """Latents (B, C, any) continued by `silence` (C, window) to a whole window."""
    if silence is None or (rest := silence.shape[1] - x.shape[2]) <= 0:
        return x
    return torch.cat((x, silence[None, :, -rest:].to(x).expand(len(x), -1, -1)), 2)
