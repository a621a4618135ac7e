"""Finding and reading the weights of other people's networks, of which only tensors are ever read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.result import Missing
from stable_audio_lite.errors import UserError

_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)/(.+)")


@dataclass(frozen=True, kw_only=True)
class Published:
    """Source of published weights.

    Attributes:
        file: name under which they are looked for.
        address: what to fetch.
        option: by which another place is given.
    """

    file: str
    address: str
    option: str

    def find(self, given: str | None, folder: Path) -> Path:
        """The file `given`, a path or `owner/name/file` on the Hugging Face hub; else the one in `folder`.

        Raises:
            Missing: none is given, and `folder` has none.
            UserError: what is given is not there.
        """
        if given is None:
            path = folder / self.file
            if not path.is_file():
                raise Missing(f"fetch {self.address} and put it in {folder}/, or give {self.option} FILE")
            return path
        if Path(given).is_file():
            return Path(given)
        if (match := _HUB_FILE.fullmatch(given)) is None or given.startswith((".", "/", "~")):
            raise UserError(f"{self.option}: {given}: no such file; fetch {self.address}")
        return _from_hub(*match.groups())


def _from_hub(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client has many, none of which the user can tell apart
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{repository}/{file}: neither a file nor one that the hub gives out ({reason})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors`, or of a file that `torch.save` wrote.

    Raises:
        UserError: the file is damaged, or holds anything but tensors by name.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise several kinds for broken files and for code in pickles
        raise UserError(f"{path}: damaged, or holds more than weights, and is not loaded; fetch it again") from error
    state = data.get("state_dict", data) if isinstance(data, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no tensors by name; fetch it again")
    return {str(name): value for name, value in state.items()}


def fill_network(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load `state` into `module`, every tensor of which must be there; batch norms' counters need not.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    own = {k: v.shape for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if wrong := sorted(k for k in own.keys() | given.keys() if own.get(k) != given.get(k)):
        raise UserError(f"{path}: no {what}: '{wrong[0]}' is missing, unknown or of another shape")
    module.load_state_dict(dict(state), strict=False)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Twelve hexadecimal digits that name weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
