"""Training on one's own music with one command: stable-audio-lite train FOLDER -o NAME.

It writes what training.pre_encode and training.train_diffusion need into NAME/pre_encode.yaml and
NAME/train_diffusion.yaml, and runs them. From then on these files say what is done: they can be changed, and the same
command, or the trainers by hand, go on with them. Only how large a batch is and how many steps fit is found out here,
by measuring a few.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from stable_audio_lite.bundle import SHIPPED, resolve
from stable_audio_lite.config import from_dict, load_config, merged, read_yaml
from stable_audio_lite.data.latents import is_finished
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.data.validate import validate_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_utf8, locked, replacing
from stable_audio_lite.systems import load_model_config
from training import pre_encode, train_diffusion
from training.command import shared_processes
from training.plan import RunPlan, measure
from training.pre_encode import PreEncodeConfig, check_captioned
from training.train_diffusion import TrainDiffusionConfig

_NEEDED = ("peft", "psutil", "tensorboard")
_BATCH, _STEPS, _LEAST_STEPS, _SECONDS = 16, 2000, 200, 1800
_MEMORY = 0.8  # of what is left for activations
_SAVED = 120  # seconds between checkpoints
_DEMOS, _PROMPTS = 4, 2
_MAX_UNREADABLE = 0.1


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A request to train on a data set; None leaves the choice to the machine.

    Attributes:
        data: folder of captioned audio, or what else `read_items` reads.
        output: folder of the run.
        base: bundle to go on from: a shipped name, a folder or a hub id.
        full: train all weights instead of a LoRA.
        config: YAML file with settings of training.train_diffusion that differ from those chosen here.
        steps, batch_size, learning_rate: of the run; the batch is that of each process.
    """

    data: str
    output: Path
    base: str = "starter"
    full: bool = False
    config: Path | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        if self.learning_rate is not None and self.learning_rate > 1:
            raise UserError(f"--learning-rate must be at most 1, got {self.learning_rate:g}")


def fine_tune(request: FineTuning) -> Path:
    """Encode, train and export, or go on with that; returns the bundle's folder.

    Raises:
        UserError: the music has no captions or too many faults, `output` is of another run, or as the trainers.
        Stopped: by a signal.
    """
    _check_installed()
    run = _Run(request)
    processes = shared_processes()
    main = processes.is_main_process
    with locked(request.output) if main else nullcontext():
        if main:
            run.prepare()
        processes.wait_for_everyone()
        pre_encode.run(load_config(run.encoding, PreEncodeConfig))
        settings = run.settings(processes)
        if main:
            run.write(settings)
        processes.wait_for_everyone()
    bundle = train_diffusion.run(load_config(run.training, TrainDiffusionConfig))
    if main:
        shown = str(request.output / bundle.name)
        words = ["stable-audio-lite", "generate", run.items[0].captions[0], "--model", shown]
        print(f"{shown}: hear it with\n  {shlex.join(words)}")
    return bundle


def _check_installed() -> None:
    """Check that the packages of the extra `train` are there.

    Raises:
        UserError: names one that isn't.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install 'stable-audio-lite[train]'")


class _Run:
    """The files of a run and what goes into them."""

    def __init__(self, request: FineTuning):
        self.request = request
        self.output = Path(os.path.abspath(request.output))
        self.base = request.base if request.base in SHIPPED else str(resolve(request.base).resolve())
        self.model = load_model_config(self.base)
        self.data = os.path.abspath(request.data) if os.path.exists(request.data) else request.data
        for path in (self.output, self.base, self.data):
            check_utf8(path)
        if self.output.is_relative_to(self.data):
            raise UserError(f"{request.output}: lies within the music; choose a folder beside {request.data}")
        self.items: list[Item] = read_items(self.data)
        check_captioned(self.items, request.data)

    @property
    def encoding(self) -> Path:
        """The settings of training.pre_encode."""
        return self.output / "pre_encode.yaml"

    @property
    def training(self) -> Path:
        """The settings of training.train_diffusion."""
        return self.output / "train_diffusion.yaml"

    @property
    def latents(self) -> Path:
        """The encoded music."""
        return self.output / "latents"

    def prepare(self) -> None:
        """Check the music, unless it is encoded already, and write how to encode it."""
        settings: dict[str, Any] = {"vae": self.base, "data": self.data, "output": str(self.latents)}
        if not self.encoding.exists():
            if any(not file.name.startswith(".") for file in self.output.iterdir()):
                raise UserError(f"{self.request.output}: holds other files; choose a new folder")
            settings |= {"max_unreadable": _MAX_UNREADABLE, "shard_items": 16}
        else:
            was = read_yaml(self.encoding)
            for option, key, now in (("FOLDER", "data", self.data), ("--from", "vae", self.base)):
                if was.get(key) != now:
                    raise UserError(
                        f"{self.request.output}: was begun with {option} {was.get(key)}, not {now}; give that again to "
                        "go on, or choose another -o"
                    )
            settings = was | settings
        config = from_dict(PreEncodeConfig, settings, str(self.encoding))
        if not is_finished(self.latents):
            self._validate(config.max_unreadable)
        _write(self.encoding, settings, "training.pre_encode")

    def _validate(self, max_unreadable: float) -> None:
        report = validate_items(self.items, model=self.base)
        print(report.in_short(), file=sys.stderr, flush=True)
        bad = sum(len(report.faults.get(fault, ())) for fault in ("broken", "silent"))
        if bad > max_unreadable * len(self.items):
            raise UserError(
                f"{self.request.data}: {bad} of {len(self.items)} files are broken or silent, max_unreadable allows "
                f"{max_unreadable:.0%}; mend or remove them (stable-audio-lite validate-dataset lists them)"
            )

    def settings(self, processes: PartialState) -> dict[str, Any]:
        """Settings of training: those of the run's file where there is one, or else chosen by measuring."""
        known = self.training.exists()
        settings = self.settings_asked()
        return settings if known else self._fitted(settings, processes.num_processes, say=processes.is_main_process)

    def settings_asked(self) -> dict[str, Any]:
        """Settings of the run's file, or the defaults, with what the request says in their place."""
        request, known = self.request, self.training.exists()
        settings = read_yaml(self.training) if known else self._defaults()
        if known and bool(settings.get("lora")) == request.full:
            how = "a LoRA: leave out --full" if request.full else "--full: give it again"
            raise UserError(f"{request.output}: was begun with {how}, or choose another -o")
        if request.config:
            settings = merged(settings, read_yaml(request.config))
        own: dict[str, Any] = {name: self.base for name in ("model", "initial", "vae", "clap")}
        own |= {"latents": [str(self.latents)], "run": {"output": str(self.output)}}
        own |= {"batch_size": request.batch_size} if request.batch_size else {}
        own["run"] |= {"steps": request.steps} if request.steps else {}
        own |= {"optimizer": {"lr": request.learning_rate}} if request.learning_rate else {}
        return merged(settings, own)

    def _defaults(self) -> dict[str, Any]:
        """Settings that don't depend on how large and fast the machine is."""
        full, captions = self.request.full, dict.fromkeys(item.captions[0] for item in self.items)
        betas_and_decay = {"betas": [0.9, 0.99], "weight_decay": 0.01, "warmup_steps": 20, "decay": "cosine"}
        return {
            "lora": None if full else {"rank": 16, "alpha": 16},
            "time_shift": 2.0,
            "optimizer": {"lr": 1e-4 if full else 1e-3} | betas_and_decay,
            "demos": {"prompts": list(captions)[:_PROMPTS], "cfg": [self.model.generation.cfg]},
            "run": {"precision": "auto", "ema_decay": 0.99},
        }

    def _fitted(self, settings: dict[str, Any], count: int, *, say: bool) -> dict[str, Any]:
        """Choose batch, steps and how often something is saved or heard, as far as the settings leave it open."""
        if say:
            print("measuring a few steps ...", file=sys.stderr, flush=True)
        run, batch = settings["run"], settings.get("batch_size")
        small = self._measured(settings, 2, count)
        if not small.largest_batch and "gradient_checkpointing" not in settings:
            settings = settings | {"gradient_checkpointing": True}
            small = self._measured(settings, 2, count)
        most = int(_MEMORY * small.largest_batch)
        if not small.largest_batch or (batch or 0) > small.largest_batch:
            less = f"a batch of {most} at most" if most else "a smaller one, or no --full"
            raise UserError(f"{self.request.base}: not enough memory to train it like that; choose {less}")
        if batch is None:
            batch = max(1, min(_BATCH, most))
            settings = settings | {"batch_size": batch}
            settings = merged({"run": {"accumulate": max(1, _BATCH // (batch * count))}}, settings)
        found = self._measured(settings, batch, count, steps=3)
        steps = run.get("steps", max(_LEAST_STEPS, min(_STEPS, int(_SECONDS / found.seconds))))
        saved = max(10, min(500, round(_SAVED / found.seconds)))
        often = {"run": {"steps": steps, "checkpoint_every": saved}, "demos": {"every": math.ceil(steps / _DEMOS)}}
        settings = merged(often, settings)
        if say:
            self._say(settings, found)
        return settings

    def _measured(self, settings: dict[str, Any], batch: int, count: int, steps: int = 1) -> RunPlan:
        probe = merged({"run": {"steps": 1}}, settings) | {"batch_size": batch, "demos": None}
        config = from_dict(TrainDiffusionConfig, probe, str(self.request.config or self.training))
        with contextlib.redirect_stderr(io.StringIO()):  # the trainer will say it all itself
            return measure("train_diffusion", config, steps=steps, processes=count)

    def _say(self, settings: Mapping[str, Any], found: RunPlan) -> None:
        run, demos, place = settings["run"], settings["demos"], self.request.output
        memory = found.weights + found.gradients + found.optimizers + found.averages + found.activations
        what = "a LoRA" if settings.get("lora") else "all weights"
        lines = [
            f"{what} of {self.request.base}, {run['steps']:,} steps of {found.step_items} windows from {found.items} "
            f"pieces: about {_duration(run['steps'] * found.seconds)} at {found.seconds:.2f} s a step, in "
            f"{memory / 1e9:.1f} GB of memory",
            f"settings: {place / self.training.name}; tensorboard --logdir {place / 'logs'}",
        ]
        lines += [f"sounds every {demos['every']} steps: {place / 'demos'}"] if demos else []
        print("\n".join(lines), file=sys.stderr, flush=True)

    def write(self, settings: dict[str, Any]) -> None:
        """Write the settings of training, checked."""
        from_dict(TrainDiffusionConfig, settings, str(self.training))
        _write(self.training, settings, "training.train_diffusion")


def _write(path: Path, settings: dict[str, Any], trainer: str) -> None:
    """Write settings that the `trainer` reads, unless the file says the same already."""
    if path.exists() and read_yaml(path) == settings:
        return
    with replacing(path) as temporary:
        head = f"# python -m {trainer} --config {shlex.quote(str(path))}\n"
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        temporary.write_text(head + text, encoding="utf-8")


def _duration(seconds: float) -> str:
    """Seconds in words."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
