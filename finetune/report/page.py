"""The one page: gathers what the template shows, embeds the pictures, writes the four files of a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune import __version__, runs
from finetune.report import plots, words
from finetune.report.grid import closest, grid
from finetune.report.palette import looks
from finetune.report.pictures import data_uri, instance_path
from finetune.report.read import Comparison, Row, read
from finetune.report.snippets import loadings
from finetune.report.tables import cells, csv_text, judge_name, markdown_text, report_data, tie_note
from finetune.report.verdict import verdict

TEMPLATES = Path(__file__).parent / "templates"

def write(folder: Path | str) -> Path:
    """Write report.html, report.json, table.csv and table.md of a comparison; from files alone, without torch.

    Args:
        folder: of a `finetune compare`: comparison.json, scores.json, one folder for each run. Rows, scores and
            whole runs may be missing; the page says so.

    Returns:
        Path of report.html.

    Raises:
        Problem: the folder holds no comparison.
    """
    comparison = read(folder)
    page = html(comparison)
    runs.write_json(comparison.folder / "report.json", report_data(comparison))
    runs.write_text(comparison.folder / "table.csv", csv_text(comparison))
    runs.write_text(comparison.folder / "table.md", markdown_text(comparison))
    runs.write_text(comparison.folder / "report.html", page)
    return comparison.folder / "report.html"


def html(comparison: Comparison) -> str:
    """The page as text."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters["numbers"] = _numbers
    environment.filters["ticks"] = _ticks
    groups = grid(comparison)
    statements = verdict(comparison)
    return environment.get_template("report.html.j2").render(
        title=_title(comparison), model=_value("model", comparison.info.get("model")), comparison=comparison, info=comparison.info,
        instances=_instances(comparison), looks=looks(comparison), judge=judge_name(comparison), statements=statements,
        has=lambda kind: any(one.kind == kind for one in statements), table=_table(comparison), headings=_headings(comparison),
        ties={column.key: tie_note(comparison, column) for column in comparison.columns},
        grid=groups, hero=_hero(groups),
        learners=[row for row in comparison.runs if any("validation_loss" in line for line in row.metrics)],
        losses=Markup(plots.loss_curves(comparison)), tradeoffs=Markup(plots.tradeoffs(comparison)), copies=closest(comparison),
        loadings=loadings(comparison), settings=_settings(comparison), recorded=[row for row in comparison.runs if row.settings],
        footer=_footer(comparison), version=__version__, words=words)


def _title(comparison: Comparison) -> str:
    many, noun = len(comparison.runs), comparison.info.get("class_noun") or "subject"
    ways = f"{words.number_word(many).capitalize()} way{'s' if many != 1 else ''}"
    return f"{ways} to teach a model this {noun}"


def _hero(groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of the grid that opens the page: the first prompt with the subject."""
    return next((group["lines"][0] for group in groups if group["kind"] == "subject" and group["lines"]), None)


def _instances(comparison: Comparison) -> list[dict[str, str]]:
    found = [(Path(file).name, instance_path(comparison, file)) for file in comparison.info.get("instance_files", [])]
    return [{"name": name, "uri": uri} for name, path in found if path and (uri := data_uri(path, 320, 88))]


def _table(comparison: Comparison) -> list[dict[str, Any]]:
    return [{"row": row, "cells": cells(comparison, row), "below": _below(comparison, row)} for row in comparison.rows]


def _below(comparison: Comparison, row: Row) -> str:
    """The small line under a row's name: what it is, or what its budget was."""
    if row.kind == "base":
        return "the floor"
    if row.kind == "real":
        return "against each other: the ceiling"
    if row.failed:
        return ""
    steps, pictures = row.manifest.get("steps"), row.manifest.get("pictures_seen")
    parts = [f"{steps:,} steps" if steps else "", f"{pictures:,} pictures seen" if pictures else ""]
    extra = (row.manifest.get("seconds") or {}).get("class_images")
    parts.append(f"class pictures {words.seconds(extra)}" if extra else "")
    return ", ".join(part for part in parts if part)


def _headings(comparison: Comparison) -> list[tuple[str, int]]:
    """Headings over neighbouring columns."""
    names = {"clip_i": "Subject", "dino": "Subject", "clip_t": "Prompt", "drift": "Base kept", "other_drift": "Base kept",
             "leak": "Base kept", "diversity": "Pictures", "copy": "Pictures"}
    found: list[tuple[str, int]] = []
    for column in comparison.columns:
        name = "Cost" if column.kind == "cost" else names.get(column.key, "")
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + 1)
        else:
            found.append((name, 1))
    return found


def _settings(comparison: Comparison) -> list[tuple[str, list[str], bool]]:
    """Every setting as (key, value of each run, whether the runs differ), paths by their last part."""
    shown = [row for row in comparison.runs if row.settings]
    keys = dict.fromkeys(key for row in shown for key in row.settings)
    found = []
    for key in keys:
        values = [_value(key, row.settings[key]) if key in row.settings else words.NOTHING for row in shown]
        found.append((key, values, len(set(values)) > 1))
    return found


def _value(key: str, value: Any) -> str:
    if value is None or value == "" or value == []:
        return words.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and ("dir" in key or key in ("output", "model")) and "/" in value:
        return Path(value).name if Path(value).is_absolute() else value
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _footer(comparison: Comparison) -> dict[str, Any]:
    """Commands, versions, devices and hashes, each once."""
    manifests = [row.manifest for row in comparison.runs if row.manifest]
    command = comparison.info.get("command")
    commands = [command] if command else list(dict.fromkeys(one["command"] for one in manifests if one.get("command")))
    here = f"{comparison.folder.resolve()}/"
    commands = [(" ".join(map(str, one)) if isinstance(one, list) else str(one)).replace(here, f"{comparison.folder.resolve().name}/")
                for one in commands]
    versions: dict[str, str] = {}
    for one in manifests:
        versions.update({name: str(value) for name, value in (one.get("versions") or {}).items()})
    dates = sorted(str(one["finished"]) for one in manifests if one.get("finished"))
    first = manifests[0] if manifests else {}
    return {"commands": commands, "versions": versions, "devices": list(dict.fromkeys(str(one["device"]) for one in manifests if one.get("device"))),
            "date": dates[-1][:10] if dates else "", "hash": comparison.info.get("model_hash") or "", "prompts": _prompts(comparison),
            "pictures": first.get("pictures", []), "skipped": first.get("skipped", [])}


def _prompts(comparison: Comparison) -> str:
    """How many prompts and seeds of each kind were rendered."""
    parts = []
    for kind in ("subject", "class", "other"):
        many, seeds = len(comparison.suite.get(kind) or []), comparison.seeds_of(kind)
        if many:
            parts.append(f"{many} {kind} prompt{'s' if many != 1 else ''} with {seeds} seed{'s' if seeds != 1 else ''} each")
    return words.listing(parts) or "no prompts recorded"


def _numbers(text: str) -> Markup:
    """Mute the intervals in a sentence, so that the eye reads the sentence first."""
    return Markup(re.sub(r"(\[[^\]]*\])", r'<span class="interval">\1</span>', str(escape(text))))


def _ticks(text: str) -> Markup:
    """`file` in backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
