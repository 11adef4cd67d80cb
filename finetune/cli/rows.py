"""The rows of a comparison: from `--methods` to one resolved set of training settings for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.cli.compare_settings import SHARED, CompareSettings
from finetune.errors import Problem, nearest
from finetune.methods import get, names
from finetune.settings import TrainSettings, resolve

WIRING = ("query", "key", "value")
HYPERNETWORKS = ("hypernetwork:key,value", "hypernetwork:key,query")
ALWAYS = ("model", "seed", "device", "precision", "steps", "batch_size", "accumulate")
# What must agree for a comparison to be fair; a row's own table may still change it, which is then said aloud.
FAIR = ("seed", "steps", "batch_size", "accumulate", "resolution", "crop", "flip")
# What may differ between two runs that are the same row.
INCIDENTAL = ("output", "resume", "overwrite", "device", "log_every", "checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True)
class Row:
    """One row to train.

    Attributes:
        values: what its recipe holds; the base family's recipe fills in the rest.
        settings: the same, resolved.
    """

    name: str
    method: str
    title: str
    subject: str
    values: dict[str, Any]
    settings: TrainSettings


def plan(settings: CompareSettings, family_of: Callable[[str], str]) -> list[Row]:
    """All rows, resolved and checked before anything trains.

    Raises:
        Problem: an unknown method, a row named twice, or a setting its method does not take.
    """
    rows = [row(settings, spec, family_of) for spec in specs(settings.methods)]
    twice = [one.name for number, one in enumerate(rows) if one.name in [other.name for other in rows[:number]]]
    if twice:
        raise Problem(f"--methods names {twice[0]!r} twice.", "Each row has a folder of its own name.", "Name it once.")
    return rows


def specs(methods: str) -> list[str]:
    """Split `lora,hypernetwork:key,query` at commas that do not belong to a wiring; `hypernetwork` becomes two rows."""
    found: list[str] = []
    for word in (part.strip() for part in methods.split(",")):
        if word in WIRING and found and ":" in found[-1]:
            found[-1] += f",{word}"
        elif word:
            found.append(word)
    if not found:
        raise Problem(f"--methods {methods!r} names no method.", "There is nothing to compare.", f"Known are {', '.join(names())}.")
    return [spec for word in found for spec in (HYPERNETWORKS if word == "hypernetwork" else (word,))]


def row(settings: CompareSettings, spec: str, family_of: Callable[[str], str]) -> Row:
    """One row: shared settings, then what the method needs, then the row's own table."""
    word, _, wiring = spec.partition(":")
    own = dict(settings.rows.get(word, {}))
    method = own.pop("method", word)
    if method not in names():
        raise Problem(f"There is no method {method!r} for --methods.", nearest(method, [*names(), *settings.rows]),
                      f"Known are {', '.join(names())}; a recipe may add rows with [rows.NAME] and method = \"...\".")
    kind = get(method)
    fields = kind.Settings.model_fields
    if wiring and "transform" not in fields:
        raise Problem(f"{spec!r}: {method} has no wiring.", "Only a hypernetwork's row is written METHOD:key,query.", f"Write {method!r}.")
    name = f"{word}-{wiring.replace(',', '-')}" if wiring else word
    values = {**shared(settings, fields), **({"transform": wiring} if wiring else {}), **own, **settings.rows.get(name, {})}
    values.pop("method", None)
    values["output"] = settings.output.resolve() / name
    resolved = resolve(kind.Settings, values, None, family_of)
    title = f"{kind.title} ({wiring.replace(',', ', ')})" if wiring else kind.title if word == method else f"{kind.title} ({word})"
    trained = kind(resolved)
    trained.check()
    return Row(name, method, title, trained.subject, values, resolved)


def shared(settings: CompareSettings, fields: dict[str, Any]) -> dict[str, Any]:
    """What every row gets: the run's settings, the budget, and whatever else was given."""
    given = settings.model_fields_set
    values = {key: getattr(settings, key) for key in (*ALWAYS, *SHARED) if key in given or key in ALWAYS}
    for key in ("instance_dir", "class_dir"):
        if values.get(key) is not None:
            values[key] = Path(values[key]).expanduser().resolve()
    if "placeholder" in fields:
        # This method names the subject by its own new word; a phrase around a rare token does not apply to it.
        values.pop("subject", None)
        noun = (settings.class_noun or "subject").strip().replace(" ", "-")
        values["placeholder"] = settings.placeholder or f"<my-{noun}>"
        if settings.class_noun:
            values["initializer"] = settings.class_noun
    return {key: value for key, value in values.items() if value is not None}


def unfair(rows: list[Row], meant: Iterable[str] = ()) -> list[str]:
    """One sentence for each budget setting in which the rows differ, but for those that are `meant` to."""
    found = []
    for key in (key for key in FAIR if key not in meant):
        values = {row.name: getattr(row.settings, key) for row in rows}
        if len(set(values.values())) > 1:
            found.append(f"Rows differ in {key}: {', '.join(f'{name} {value}' for name, value in values.items())}.")
    return found


def same(row: Row, written: dict[str, Any]) -> bool:
    """Whether settings on disk are this row's, up to what cannot change the result."""
    wanted = json.loads(row.settings.model_dump_json())
    return all(wanted.get(key) == written.get(key) for key in wanted.keys() | written.keys() if key not in (*INCIDENTAL, "method", "rung"))


def recipe_text(row: Row) -> str:
    """The row's settings as a recipe that trains it alone."""
    lines = [f"# Row {row.name!r} of a comparison. Train it alone: finetune {row.method} --recipe THIS-FILE",
             f"method = {toml(row.method)}"]
    return "\n".join([*lines, *(f"{key} = {toml(value)}" for key, value in row.values.items())]) + "\n"


def toml(value: Any) -> str:
    """A value in TOML. Its basic strings take JSON's escapes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(part)}" for key, part in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
