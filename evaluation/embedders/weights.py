"""Finding the weights of other people's networks, and filling the networks with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from evaluation.result import Missing
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import fetch_from_hub, load_state

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
        repository, file = match.groups()
        path = fetch_from_hub(repository, [file]) / file
        if not path.is_file():
            raise UserError(f"{self.option}: {given}: the hub repository has no such file")
        return path


def fill_network(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load `state` into `module`, every tensor of which must be there; batch norms' counters need not.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    load_state(module, counters | dict(state), str(path), what)
