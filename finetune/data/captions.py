"""Captions beside the pictures: NAME.txt, NAME.caption, metadata.csv, metadata.jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".txt", ".caption")
TABLES = ("metadata.csv", "metadata.jsonl")
_COLUMNS = ("text", "caption")


def is_caption_file(path: Path) -> bool:
    """Whether a file of a picture folder holds captions by its name."""
    return path.suffix.lower() in SUFFIXES or path.name.lower() in TABLES


def read_captions(files: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """Captions from the caption files among `files`, and notes on those that could not be used.

    Returns:
        caption by file name of the picture ("a.jpg") or, from NAME.txt, by its stem with a "/" behind it ("a/"),
        which no file name can be; notes.
    """
    found: dict[str, str] = {}
    notes: list[str] = []
    tables = [path for path in files if path.name.lower() in TABLES]
    beside = [path for path in files if path.suffix.lower() in SUFFIXES]
    for path in tables:
        text = _text(path, notes)
        if text is not None:
            read = _csv if path.suffix.lower() == ".csv" else _jsonl
            found.update(read(path.name, text, notes))
    for path in sorted(beside, key=lambda path: path.suffix.lower() == ".txt"):  # .txt wins over .caption
        text = _text(path, notes)
        if text is not None and not text.strip():
            notes.append(f"{path.name} is empty, so the prompt template is used")
        elif text is not None:
            found[path.stem + "/"] = _one_line(text)
    return found, notes


def caption_of(file: str, captions: dict[str, str]) -> str | None:
    """The caption of a picture; a file beside it wins over a table."""
    return captions.get(Path(file).stem + "/", captions.get(file))


def unused(captions: dict[str, str], pictures: Sequence[str]) -> list[str]:
    """Names that captions were given for, without such a picture."""
    names = {*pictures, *(Path(file).stem + "/" for file in pictures)}
    return sorted(name.removesuffix("/") for name in captions if name not in names)


def _text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.append(f"{path.name} is not UTF-8 text, so its captions are left out; save it as UTF-8")
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
    return None


def _one_line(text: str) -> str:
    """One line of text that can be written again: JSON can spell half a sign, which UTF-8 cannot."""
    return " ".join(text.encode(errors="replace").decode().split())


def _csv(name: str, text: str, notes: list[str]) -> dict[str, str]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        notes.append(f"{name} is not a CSV table ({error})")
        return {}
    return _table(name, rows, notes)


def _jsonl(name: str, text: str, notes: list[str]) -> dict[str, str]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):  # numbers of thousands of digits and deep nesting among them
            row = "broken"
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            notes.append(f"{name} line {number} is not a JSON object and is left out")
    return _table(name, rows, notes)


def _table(name: str, rows: list[dict], notes: list[str]) -> dict[str, str]:
    if not rows:
        notes.append(f"{name} has no rows")
        return {}
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    text = next((column for column in _COLUMNS if column in columns), None)
    if "file_name" not in columns or text is None:
        notes.append(f"{name} needs the columns file_name and text (or caption); it has {', '.join(columns)}")
        return {}
    pairs = [(row.get("file_name"), row.get(text)) for row in rows]
    return {file: _one_line(caption) for file, caption in pairs
            if isinstance(file, str) and isinstance(caption, str) and caption.strip()}
