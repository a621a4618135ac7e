"""Bundles: a folder with `config.yaml`, one safetensors file per part and the tokenizer, which loads alone.

Parts are `vae`, `text_encoder`, `audio_encoder` (CLAP's audio tower), `conditioner`, `unet` and `transformer`. All are
optional in a folder: a trainer writes the one it trained beside the same `config.yaml`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stable_audio_lite.config import read_yaml, save_config
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder, save_tensors, sha256
from stable_audio_lite.weights import fetch_from_hub, load_state, read_safetensors

FORMAT = 1
PARTS = ("vae", "text_encoder", "audio_encoder", "conditioner", "unet", "transformer")
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, TOKENIZER_FILE, "*.safetensors", "*.md", "*.png", "lora/*.json")
"""Patterns of the files that make up a bundle on the hub, the card's pictures and a LoRA included."""
SHIPPED = {name: Path(__file__).parent / name.replace("-", "_") for name in ("starter", "starter-vae", "restorer")}
"""Bundles that come with the package."""

M = TypeVar("M", bound=nn.Module)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read a system's config from a YAML file, a bundle folder or a shipped bundle's name; returns (file, contents).

    Raises:
        UserError: no such file, or made by another version of this package.
    """
    path = SHIPPED.get(str(path), Path(path))
    file = path / CONFIG_FILE if path.is_dir() else path
    data = read_yaml(file)
    if "kind" not in data:
        raise UserError(f"{file}: has no key 'kind', so this is no model config")
    if (version := data.get("format", FORMAT)) != FORMAT:
        raise UserError(
            f"{file}: made by another version of this package (format {version}, this one reads {FORMAT}); "
            "install the version that wrote it or convert it"
        )
    return file, data


def resolve(name: str | Path) -> Path:
    """The folder of a bundle given as one of the names in `SHIPPED`, a path, or an id on the Hugging Face hub.

    Raises:
        UserError: there is no such bundle, or it can't be downloaded.
    """
    if not isinstance(name, (str, Path)):
        raise UserError(f"a bundle is a name or a path, got {name!r}")
    if (shipped := SHIPPED.get(str(name))) is not None:
        if not (shipped / CONFIG_FILE).is_file():
            raise UserError(f"{shipped}: these weights are missing from this installation; install it again")
        return shipped
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"{path}: no bundle, it has no {CONFIG_FILE}")
        return path
    if path.exists():
        raise UserError(f"{path}: a bundle is a folder with {CONFIG_FILE} and weights; give the folder")
    if not _HUB_ID.fullmatch(str(name)):
        raise UserError(f"{name}: no such bundle; give {', '.join(SHIPPED)}, a folder or a hub id like a/b")
    folder = fetch_from_hub(str(name), FILES)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{name}: this hub repository has no {CONFIG_FILE}, so it is no bundle")
    return folder


def save_bundle(
    folder: str | Path,
    config: Any,
    parts: Mapping[str, Mapping[str, Tensor]],
    tokenizer_json: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write a bundle in one go; a bundle already at `folder` is replaced only once the new one is complete.

    Args:
        folder: the folder to write.
        config: of the whole system, a dataclass; see `stable_audio_lite.systems`.
        parts: state dict of each part in `PARTS` that is to be stored; floating types are kept.
        tokenizer_json: contents of `tokenizer.json`, where the text encoder is our own.
        extra_files: other files by name, for instance a README.md.

    Raises:
        UserError: `folder` holds something other than a bundle, or can't be written.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}, expected some of {PARTS}")
    check_replaceable(folder)
    with replacing_folder(folder) as temporary:
        save_config(config, temporary / CONFIG_FILE)
        for name, state in parts.items():
            save_tensors(part_path(temporary, name), state, {"format": "pt"})
        texts = dict(extra_files or {})
        if tokenizer_json is not None:
            texts[TOKENIZER_FILE] = tokenizer_json
        for file_name, text in texts.items():
            (temporary / file_name).write_bytes(text.encode("utf-8") if isinstance(text, str) else text)


def check_replaceable(folder: str | Path) -> None:
    """Refuse to replace anything but a bundle, a bundle's card on its own or an empty folder.

    Raises:
        UserError: `folder` is a file or a folder with other contents.
    """
    path = Path(folder)
    if path.is_dir():
        others = [file for file in path.iterdir() if file.name != CARD_FILE]
        if others and not (path / CONFIG_FILE).is_file():
            raise UserError(f"{path}: holds other files, not a bundle; choose a new folder")
    elif os.path.lexists(path):
        raise UserError(f"{path}: is a file, or a link to nothing; a bundle is written as a folder")


def part_path(folder: str | Path, name: str) -> Path:
    """Path of part `name` in a bundle's folder, or in the shipped bundle of that name; the file need not exist."""
    return SHIPPED.get(str(folder), Path(folder)) / f"{name}.safetensors"


def check_part(folder: str | Path, name: str) -> Path:
    """Return the path of part `name`.

    Raises:
        UserError: the file is missing.
    """
    path = part_path(folder, name)
    if not path.is_file():
        raise UserError(f"{path}: missing, so this bundle has no {name}; use a complete bundle")
    return path


def read_part(folder: str | Path, name: str) -> dict[str, Tensor]:
    """The state dict of one part, on the CPU, in the floating types it was stored in.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_safetensors(check_part(folder, name))[0]


def load_part(folder: str | Path, name: str, module: nn.Module, assign: bool = False) -> None:
    """Load part `name` into `module`; every tensor must fit.

    The module keeps its floating type; with `assign` it adopts the file's tensors, their type included, without a copy.

    Raises:
        UserError: the file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    load_state(module, read_part(folder, name), str(part_path(folder, name)), "the config", assign)


def load_module(folder: str | Path, name: str, build: Callable[[], M]) -> M:
    """Build a module with `build` and load part `name` into it, ready for inference, in the floating type of its file.

    Raises:
        UserError: as `load_part`.
    """
    with WithoutInitialisation():
        module = build()
    load_part(folder, name, module, assign=True)
    return module.eval().requires_grad_(False)


class WithoutInitialisation(TorchFunctionMode):
    """Context in which new modules leave their weights uninitialised, because they are about to be loaded."""

    _FILLING = frozenset({"uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_", "copy_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._FILLING:
            return args[0] if args else kwargs["tensor"]  # torch.nn.init passes it by name
        return func(*args, **kwargs)


def model_hash(folder: str | Path) -> str:
    """Twelve hexadecimal digits that identify a bundle's contents: config, tokenizer and every part."""
    digest = hashlib.sha256()
    names = (CONFIG_FILE, TOKENIZER_FILE, *(f"{name}.safetensors" for name in PARTS))
    for name in names:
        if (path := Path(folder) / name).is_file():
            digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()[:12]


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a bundle to the Hugging Face hub, creating the repository if it doesn't exist; returns its address.

    Raises:
        UserError: not logged in, no permission, or no connection.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload a bundle"
        )
    except Exception as error:  # from the hub client or from the HTTP library beneath it
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{repo_id}: can't be uploaded, log in with 'hf auth login' ({reason})") from error
    return f"https://huggingface.co/{repo_id}"
