"""Models that a server may load: those that ship with the package and those that its command line names.

Each is loaded when it is first asked for and then stays; where memory is short, the one not asked for the longest goes.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import expanded
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.request import check_number

_MOST = 4  # models kept however much memory there is: each strength of a LoRA is one
_WORKING = 512 << 20  # bytes that sampling takes beside a model's weights
_GROWTH = 2  # bytes that loading takes for each one of a file, of 16 bits and copied once


@dataclass(frozen=True)
class ModelChoice:
    """A model by its name, and the name and strength of the LoRA that is merged into it, if any."""

    name: str
    lora: str | None = None
    strength: float = 1.0


class ModelStore:
    """Loads models by name, never by a path that a request gives; may be used from several threads.

    Attributes:
        default: name of the model to use where none is named.
        names, loras: all that may be asked for.
        device: that they compute on.
    """

    def __init__(
        self,
        models: Sequence[str | Path] = ("starter",),
        loras: Sequence[str | Path] = (),
        device: str = "auto",
        dtype: str | None = None,
        free_memory: Callable[[torch.device], int] | None = None,
    ):
        """Read the configs of the models, and load none.

        Args:
            models: shipped names, folders or hub ids, each of which is its own name; the first one is the default.
            loras: folders, each of which is its own name.
            device, dtype: as `StableAudio.from_pretrained` takes them.
            free_memory: returns the free bytes of a device; by default those that the system tells.

        Raises:
            UserError: a model is no bundle that generates, or there is no such device.
        """
        self.device = choose_device(device)
        self._dtype = choose_dtype(dtype, self.device)
        self._free = free_memory or _free_memory
        self._outlines = {str(name): StableAudio.outline(name) for name in models}
        self._loras = {str(path): _lora_folder(path) for path in loras}
        self.names, self.loras = tuple(self._outlines), tuple(self._loras)
        self.default = self.names[0]
        self._loaded: dict[ModelChoice, StableAudio] = {}  # the last one asked for comes last
        self._lock = threading.RLock()

    def choose(self, name: str | None = None, lora: str | None = None, strength: float | None = None) -> ModelChoice:
        """Check a choice; None is the default model, no LoRA and full strength.

        Raises:
            UserError: there is no such name, or a strength without a LoRA.
        """
        name = self.default if name is None else name
        if name not in self._outlines:
            raise UserError(f"model: there is no {name!r} here; choose one of {', '.join(self.names)}")
        if lora is None:
            if strength is not None:
                raise UserError("lora_strength: is the strength of a LoRA; name one, or leave it out")
            return ModelChoice(name)
        if lora not in self._loras:
            raise UserError(f"lora: there is no {lora!r} here; choose one of {', '.join(self.loras) or 'none'}")
        strength = 1.0 if strength is None else strength
        check_number("lora_strength", strength)
        if not -10 <= strength <= 10:
            raise UserError(f"lora_strength must lie in -10..10, got {strength}")
        return ModelChoice(name, lora, float(strength))

    def outline(self, choice: ModelChoice) -> StableAudio:
        """Return the model without its weights, to make plans with at once."""
        return self._outlines[choice.name]

    @property
    def loaded(self) -> tuple[ModelChoice, ...]:
        """Models in memory."""
        return tuple(self._loaded)

    def load(self, choice: ModelChoice) -> StableAudio:
        """Return a model, loaded where it isn't yet.

        Raises:
            UserError: as `StableAudio.from_pretrained`, or memory is too short even without the others.
        """
        with self._lock:
            if (model := self._loaded.pop(choice, None)) is None:
                self._make_room(choice)
                model = self._read(choice)
            self._loaded[choice] = model
            return model

    def _read(self, choice: ModelChoice) -> StableAudio:
        folder = self._outlines[choice.name].folder
        lora = {} if choice.lora is None else {"lora": self._loras[choice.lora], "lora_strength": choice.strength}
        while True:
            try:
                return StableAudio.from_pretrained(folder, str(self.device), self._dtype, **lora)  # type: ignore[arg-type]
            except (MemoryError, torch.OutOfMemoryError) as error:
                if not self._drop_oldest():
                    raise UserError(f"model: there is no memory for {choice.name!r}; choose a smaller one") from error

    def _make_room(self, choice: ModelChoice) -> None:
        folder = self._outlines[choice.name].folder
        need = _WORKING + _GROWTH * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        while self._loaded and (len(self._loaded) >= _MOST or self._free(self.device) < need):
            self._drop_oldest()

    def _drop_oldest(self) -> bool:
        """Unload the model that was not asked for the longest; False if there is none."""
        if not self._loaded:
            return False
        del self._loaded[next(iter(self._loaded))]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def _lora_folder(path: str | Path) -> Path:
    folder = expanded(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the folder that a LoRA was trained into")
    return folder


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or what nobody uses any more would count as used
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
