"""Pictures and captions from what the `datasets` library loads: a hub name, a folder, or a saved data set."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import datasets

from finetune.data.intake import Intake, refuse_twin
from finetune.data.picture import Picture, Unreadable, decode
from finetune.errors import Problem, nearest
from finetune.settings import TrainSettings


def read_dataset(settings: TrainSettings) -> Intake:
    """Every row of --dataset as a checked picture. Pictures stay in the data set; a row is read when it is needed.

    Raises:
        Problem: the data set cannot be loaded, or has no such split or column.
    """
    table = _load(settings.dataset, settings.dataset_split)
    table = _undecoded(table, settings)
    found = Intake()
    texts = _captions(table, settings, found.notes)
    first_with: dict[str, str] = {}
    for index in range(len(table)):
        name = f"row {index}"
        try:
            name = _name(table[index][settings.image_column], index)
            data = functools.partial(_bytes, table, settings.image_column, index)
            content = data()
            image, notes = decode(io.BytesIO(content), settings.max_pixels)
            picture = Picture(name, None, texts[index], "; ".join(notes), hashlib.sha256(content).hexdigest(), image.size,
                              data=data, max_pixels=settings.max_pixels)
            refuse_twin(picture, first_with)
        except Unreadable as error:
            found.skipped.append((name, str(error)))
        else:
            found.pictures.append(picture)
    return found


def _load(name: str, split: str) -> datasets.Dataset:
    """The split of a data set, wherever it lies."""
    try:
        folder = Path(name)
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()
        raise Problem(f"--dataset {name} cannot be loaded.", (reason[0] if reason else type(error).__name__).rstrip(".") + ".",
                      "Give a folder or a data set name that datasets.load_dataset takes; names need the network.") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise Problem(f"--dataset {name} has no split {split!r}.", f"It has {', '.join(loaded)}.", "Name one with --dataset-split.")
    return loaded[split]


def _undecoded(table: datasets.Dataset, settings: TrainSettings) -> datasets.Dataset:
    """The data set with its picture column as raw bytes or paths, so that our own size limit comes before decoding."""
    column = settings.image_column
    if column not in table.column_names:
        raise _no_column(table, "--image-column", column)
    if not isinstance(table.features[column], datasets.Image):
        raise Problem(f"The column {column!r} of --dataset {settings.dataset} holds no pictures.",
                      f"Its type is {table.features[column]}.",
                      f"Name the picture column with --image-column; there are {', '.join(table.column_names)}.")
    return table.cast_column(column, datasets.Image(decode=False))


def _captions(table: datasets.Dataset, settings: TrainSettings, notes: list[str]) -> list[str | None]:
    """One caption or None per row. The default column may be missing; one that was asked for may not."""
    column = settings.caption_column
    if settings.captions == "template":
        return [None] * len(table)
    if column not in table.column_names:
        if "caption_column" in settings.model_fields_set:
            raise _no_column(table, "--caption-column", column)
        notes.append(f"the data set has no column {column!r} for captions (it has {', '.join(table.column_names)})")
        return [None] * len(table)
    values = [value if isinstance(value, str) else "" for value in table[column]]
    return [" ".join(value.split()) or None for value in values]


def _no_column(table: datasets.Dataset, flag: str, column: str) -> Problem:
    guess = nearest(column, table.column_names)
    return Problem(f"The data set has no column {column!r}.", f"It has {', '.join(table.column_names)}. {guess}".strip(),
                   f"Name the right one with {flag}.")


def _name(value: dict[str, Any] | None, index: int) -> str:
    path = (value or {}).get("path")
    return f"row {index} ({Path(path).name})" if path else f"row {index}"


def _bytes(table: datasets.Dataset, column: str, index: int) -> bytes:
    """The encoded picture of a row."""
    value = table[index][column] or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise Unreadable("the row holds no picture")
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise Unreadable(f"its file cannot be read ({error.strerror})") from error
