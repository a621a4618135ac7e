"""Strict YAML to frozen dataclasses and back.

A key that the dataclass lacks, a missing key without a default, or a value of another type fails with one line that
names the file and the key. Sequences become tuples, nested dataclasses recurse, `~/` at the beginning of a text is the
home folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from stable_audio_lite.errors import UserError
from stable_audio_lite.files import expand_home, expanded, replacing

T = TypeVar("T")

CONFIGS = Path(__file__).parents[1] / "configs"
"""Folder of the configs that come with the package."""


def load_config(path: str | Path, cls: type[T]) -> T:
    """Read a YAML file into dataclass `cls`.

    Raises:
        UserError: the file is missing or no YAML, or a key is unknown, missing or of the wrong type.
    """
    return from_dict(cls, read_yaml(path), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    A file that isn't there is looked for in `CONFIGS`, with or without `configs/` and `.yaml`: "stable_audio/tiny".

    A key `base` names another YAML file, relative to this file's folder, from which this one differs: mappings are
    merged key by key unless their `kind` differs, and any other value replaces the base's.

    Raises:
        UserError: the file or its base is missing, unreadable, or not a YAML mapping, or bases form a circle.
    """
    return _with_bases(find_config(path), ())


def find_config(path: str | Path) -> Path:
    """Find a YAML file as `read_yaml` does; a path that leads nowhere is returned as it is."""
    path = expanded(path)
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    places = (path, CONFIGS / name, CONFIGS / f"{name}.yaml")
    return next((place for place in places if place.is_file()), path)


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    data = _read_mapping(path)
    if (base := data.pop("base", None)) is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: key 'base' must be the name of a YAML file, got {base!r}")
    if path.resolve() in seen:
        raise UserError(f"{path}: key 'base' goes round in a circle; let one of the files stand alone")
    return merged(_with_bases(path.parent / expand_home(base), (*seen, path.resolve())), data)


def merged(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Merge a mapping into another as `read_yaml` does a file into its base."""
    result = dict(base)
    for key, value in data.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and value.get("kind", kind := below.get("kind")) == kind:
            value = merged(below, value)
        result[key] = value
    return result


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); give a YAML file, or the name of one that comes with the "
            "package, such as stable_audio/tiny"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no such date
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a YAML mapping at top level, got {type(data).__name__}")
    _check_finite(data, str(path), "", set())
    return data


def _check_finite(value: Any, where: str, key: str, seen: set[int]) -> None:
    """Look for infinite numbers in plain values, each list and mapping `seen` once: aliases may make circles."""
    if isinstance(value, (dict, list)) and id(value) not in seen:
        seen.add(id(value))
        for name, below in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(below, where, f"{key}.{name}" if key else str(name), seen)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: key '{key}' must be a finite number, got {value}")


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build dataclass `cls` from a mapping; `where` names its origin in messages.

    Raises:
        UserError: a key is unknown, missing or of the wrong type, or the dataclass refuses a value.
    """
    return _build(cls, data, where, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass into the mapping that `from_dict` turns back into an equal one (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(was: Any, now: Any, key: str = "") -> list[str]:
    """Words for each value that differs between two plain mappings, like "unet.width was 32, is 64".

    Keys that `was` lacks, as an older version may have written it, don't count.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        dot = key and key + "."
        return [words for k, value in was.items() for words in differences(value, now.get(k), f"{dot}{k}")]
    shown = ["none" if value is None else str(value) for value in (was, now)]
    return [f"{key} was {shown[0]}, is {shown[1]}"] if was != now else []


def save_config(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML that `load_config` reads back to an equal value."""
    import yaml

    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def _build(cls: Any, data: Any, where: str, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: key '{prefix.rstrip('.')}' must be a mapping, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key '{prefix}{key}'; {hint}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in data and not has_default:
            raise UserError(f"{where}: missing key '{prefix}{name}'")
    values = {k: _convert(hints[k], v, where, prefix + k) for k, v in data.items()}
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {prefix.rstrip('.') or 'config'}: {error}") from error


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [a for a in args if a is not type(None)]
        return _convert(choices[0] if len(choices) == 1 else _of_kind(choices, value, where, key), value, where, key)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where}: key '{key}' must be one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, key + ".")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: key '{key}' must be a list, got {value!r}")
        return tuple(_convert(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: key '{key}' must be a mapping, got {value!r}")
        return {k: _convert(args[1], v, where, f"{key}.{k}") for k, v in value.items()}
    return _scalar(hint, value, where, key)


def _of_kind(choices: list[Any], value: Any, where: str, key: str) -> Any:
    """Choose the dataclass whose `kind` the mapping names; without a name, the first, if its `kind` has a default."""
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in choices}
    defaults = [f.default for c in choices for f in dataclasses.fields(c) if f.name == "kind"]
    kind = value.get("kind", defaults[0]) if isinstance(value, dict) else None
    if kind not in kinds:
        raise UserError(f"{where}: key '{key}.kind' must be one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind]


def _scalar(hint: Any, value: Any, where: str, key: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as a string; people write it all the time.
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where}: key '{key}' must be {hint.__name__}, got {value!r}")
    return expand_home(value) if hint is str else value
