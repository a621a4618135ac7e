"""Hugging Face data sets with an audio column, from the hub or as `save_to_disk` wrote them."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from stable_audio_lite.audio.io import Stored
from stable_audio_lite.data.item import Item, captions_of
from stable_audio_lite.errors import UserError

PREFIX = "hf:"
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files of which `save_to_disk` leaves one in its folder."""


def read_hub_items(name: str) -> list[Item]:
    """The items of `hf:owner/name`, `hf:owner/name:split` (train without one) or a folder that `save_to_disk` wrote
    (of several splits train, or the only one).

    The texts are in the column "captions" (lists) or "text". Audio stays as it is stored until it is read.

    Raises:
        UserError: the package datasets is missing, there is no such data set, or it has no column of audio.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: needs datasets; install it with: pip install 'stable-audio-lite[datasets]'"
        ) from error
    if not name.removeprefix(PREFIX).partition(":")[0].strip("/ "):
        raise UserError(f"{name}: names no data set; give {PREFIX}owner/name")
    address, _, split = name.removeprefix(PREFIX).partition(":") if name.startswith(PREFIX) else (name, "", "")
    try:
        if name.startswith(PREFIX):
            table = datasets.load_dataset(address, split=split or "train")
        else:
            table = datasets.load_from_disk(address)
            if isinstance(table, datasets.DatasetDict):
                if "train" not in table and len(table) != 1:
                    raise UserError(f"{name}: has the splits {', '.join(table)}; give the folder of one")
                table = table["train"] if "train" in table else next(iter(table.values()))
    except UserError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: no data set that can be loaded ({' '.join(str(error).split())[:160]})") from error
    columns = [k for k, feature in table.features.items() if isinstance(feature, datasets.Audio)]
    if not columns:
        raise UserError(f"{name}: has no column of audio, only {', '.join(table.features)}")
    column = columns[0]
    table = table.cast_column(column, datasets.Audio(decode=False))
    texts = table.remove_columns([k for k in table.features if k != "text" and k != "captions"])
    items = []
    for index, row in enumerate(texts if texts.num_columns else [{}] * len(table)):
        where = f"{name}[{index}]"
        source = Stored(where, partial(_open, table, index, column))
        items.append(Item(path=source, captions=captions_of(row, where), metadata=row))
    return items


def _open(table: Any, index: int, column: str) -> BinaryIO:
    stored = table[index][column]
    if stored is None:
        raise FileNotFoundError(f"column '{column}' is empty")
    return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else Path(stored["path"]).open("rb")
