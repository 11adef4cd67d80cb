"""Pictures and captions from what the `datasets` library loads: a hub name, a folder, or a saved data set."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from finetune import runs
from finetune.data.intake import Intake, refuse_twin
from finetune.data.picture import Picture, Unreadable, decode
from finetune.errors import Problem, nearest
from finetune.settings import TrainSettings

HUB_SECONDS = 5.0  # how long the hub may take to answer before it counts as out of reach
# What the library raises on names that lead nowhere and files that are damaged.
BROKEN = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError, datasets.exceptions.DatasetsError)


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
    roots = (Path(settings.dataset).resolve(), Path(datasets.config.HF_CACHE_HOME).resolve(), Path(datasets.config.HF_DATASETS_CACHE).resolve())
    for index in range(len(table)):
        name = f"row {index}"
        try:
            name = _name(table[index][settings.image_column], index)
            data = functools.partial(_bytes, table, settings.image_column, index, roots)
            content = data()
            digest = hashlib.sha256(content).hexdigest()
            refuse_twin(digest, name, first_with)
            image, notes = decode(io.BytesIO(content), settings.max_pixels)
            picture = Picture(name, None, texts[index], "; ".join(notes), digest, image.size, data=data, max_pixels=settings.max_pixels)
            first_with[digest] = name
        except Unreadable as error:
            found.skipped.append((name, str(error)))
        else:
            found.pictures.append(picture)
    return found


def _load(name: str, split: str) -> datasets.Dataset:
    """The split of a data set, wherever it lies."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers

    if name in readers and not Path(name).is_dir():  # the library would read whatever lies in the current folder
        raise Problem(f"--dataset {name} is no data set.", "It is the name of one of the library's readers.", "Name a folder, or a data set of the hub: OWNER/NAME.")
    try:
        folder = Path(name)
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            _check_saved(folder)
            loaded = datasets.load_from_disk(name)
        elif folder.is_dir():
            loaded = _of_folder(folder)
        else:
            with _patience(name):
                loaded = datasets.load_dataset(name)
    except BROKEN as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ else error
        reason = str(cause).strip().splitlines()
        raise Problem(f"--dataset {name} cannot be loaded.", (reason[0] if reason else type(error).__name__).rstrip(".") + ".",
                      "Give a folder or a data set name that datasets.load_dataset takes; names need the network.") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise Problem(f"--dataset {name} has no split {split!r}.", f"It has {', '.join(loaded)}.", "Name one with --dataset-split.")
    return loaded[split]


def _check_saved(folder: Path) -> None:
    """The tables of a saved data set lie beside the state.json that names them."""
    for state in (folder / "state.json", *folder.glob("*/state.json")):
        if state.is_file():
            for entry in runs.read_json(state)["_data_files"]:
                if Path(entry["filename"]).name != entry["filename"]:
                    raise Problem(f"--dataset {folder} names the file {entry['filename']}, which is not in it.",
                                  "A data set learns from its own folder alone.", "Save it again with save_to_disk.")


def _of_folder(folder: Path) -> Any:
    """A folder of pictures or tables, of which every file lies in it: a README.md there may name files anywhere.

    Raises:
        Problem: it names one outside.
    """
    builder = datasets.load_dataset_builder(str(folder))
    root = folder.resolve()
    for file in (str(file) for files in (builder.config.data_files or {}).values() for file in files):
        if "://" in file or not Path(file).resolve().is_relative_to(root):
            raise Problem(f"--dataset {folder} names the file {file}, which is not in it.", "A data set learns from its own folder alone.",
                          "Copy the file into the folder, or take it out of README.md.")
    builder.download_and_prepare()
    return builder.as_dataset()


@contextlib.contextmanager
def _patience(name: str) -> Iterator[None]:
    """Ask the hub once whether it is there. If not, only the cache is read: the library would ask six times, for 25 seconds."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    before = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        pass  # it answered, or the name is none: the library says what is wrong
    except (OfflineModeIsEnabled, OSError, RuntimeError, *_http_errors()):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _http_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when nobody answers: its HTTP library has changed its name before."""
    found = []
    for library in ("httpx", "httpx2", "requests"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
            found.append(getattr(module, "TransportError", None) or module.RequestException)
    return tuple(found)


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


def _bytes(table: datasets.Dataset, column: str, index: int, roots: tuple[Path, ...]) -> bytes:
    """The encoded picture of a row. A row may name a file instead: in the data set's own folder, or where the library unpacks archives."""
    value = table[index][column] or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise Unreadable("the row holds no picture")
    try:
        path = Path(value["path"]).resolve()
        if not any(path.is_relative_to(root) for root in roots):
            raise Unreadable("it names a file outside the data set")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise Unreadable(f"its file cannot be read ({getattr(error, 'strerror', None) or error})") from error
