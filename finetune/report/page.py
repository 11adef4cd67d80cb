"""The one page: gathers what the template shows, embeds the pictures, writes the four files of a report."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune import __version__, runs
from finetune.report import curves, plots, study, words
from finetune.report.cells import subjects
from finetune.report.grid import closest, grid
from finetune.report.headline import headline
from finetune.report.palette import looks, variables
from finetune.report.pictures import data_uri, instance_path
from finetune.report.read import Column, Comparison, Row, read
from finetune.report.snippets import loadings
from finetune.report.tables import cells, csv_text, judge_name, markdown_text, report_data, tie_note
from finetune.report.verdict import verdict

TEMPLATES = Path(__file__).parent / "templates"
WIDEST = 13  # columns of one table: what a landscape sheet holds


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
    environment.filters["safe_svg"] = Markup
    statements = verdict(comparison)
    style = environment.get_template("style.j2").render(light=Markup(variables()), dark=Markup(variables(dark=True)))
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=_title(comparison), model=_value("model", comparison.info.get("model")), comparison=comparison, info=comparison.info,
        headline=headline(comparison), instances=_instances(comparison), looks=looks(comparison), judge=judge_name(comparison),
        style=Markup(style), script=Markup(script), policy=policy(style, script), statements=statements,
        has=lambda kind: any(one.kind == kind for one in statements), tables=_tables(comparison),
        ties={column.key: tie_note(comparison, column) for column in comparison.columns},
        grid=study.study_grid(comparison) if comparison.cells else grid(comparison), copies=closest(comparison),
        prices=plots.prices(comparison), tradeoffs=plots.tradeoffs(comparison), losses=curves.losses(comparison),
        quality=curves.quality(comparison), study=_study(comparison), loadings=loadings(comparison), settings=_settings(comparison),
        recorded=[row for row in comparison.runs if row.settings], footer=_footer(comparison), version=__version__, words=words,
        error_note=error_note)


def policy(style: str, script: str) -> str:
    """The page's content security policy (W3C CSP 3): its own script and style by their hashes, pictures inside the page, nothing else.

    So a text that got into the page as markup could neither run nor ask anything of anywhere. Attributes may style, which the
    plots' marks need; what they could load is forbidden with the rest.
    """
    own = f"style-src-elem {_hash(style)}; style-src {_hash(style)}; style-src-attr 'unsafe-inline'; script-src {_hash(script)}"
    return f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(comparison: Comparison) -> str:
    many, noun = len(comparison.runs), comparison.info.get("class_noun") or "subject"
    ways = f"{words.number_word(many).capitalize()} way{'s' if many != 1 else ''}"
    if not comparison.cells:
        return f"{ways} to teach a model this {noun}"
    count = len(subjects(comparison.cells))
    seeds = {cell.seed for cell in comparison.cells}
    return f"{ways} to teach a model, over {count} subject{'s' if count != 1 else ''} and {len(seeds)} training seed{'s' if len(seeds) != 1 else ''}"


def _study(comparison: Comparison) -> dict[str, Any] | None:
    """What only a study shows."""
    if not comparison.cells:
        return None
    return {"dots": study.dots(comparison), "ranks": study.rank_table(comparison), "rank_columns": study.rank_columns(comparison),
            "wins": study.win_tables(comparison), "cells": study.cell_table(comparison)}


def _instances(comparison: Comparison) -> list[dict[str, str]]:
    found = [(Path(file).name, instance_path(comparison, file)) for file in comparison.info.get("instance_files", [])]
    return [{"name": name, "uri": uri} for name, path in found if path and (uri := data_uri(path, 320, 88))]


def error_note(column: Column) -> str:
    """How far a metric can be trusted: `Told apart 98.7 % of 600 known pairs (oracle against foils).`."""
    error = column.error or {}
    if error.get("rate") is None or not error.get("pairs"):
        return ""
    against = f" ({error['against']})" if error.get("against") else ""
    return f"Told apart {100 * (1 - error['rate']):.1f} % of {error['pairs']:,} known pairs{against}."


def _tables(comparison: Comparison) -> list[dict[str, Any]]:
    """The table; in two or more where it would be wider than a page, cut between groups of columns."""
    groups: list[tuple[str, list[Column]]] = []
    for column in comparison.columns:
        if not groups or groups[-1][0] != column.group:
            groups.append((column.group, []))
        groups[-1][1].append(column)
    parts: list[list[tuple[str, list[Column]]]] = [[]]
    for group in groups:
        if parts[-1] and sum(len(columns) for _, columns in [*parts[-1], group]) > WIDEST:
            parts.append([])
        parts[-1].append(group)
    found = []
    for part in parts:
        columns = [column for _, its in part for column in its]
        keys = {column.key for column in columns}
        lines = [{"row": row, "cells": [cell for cell in cells(comparison, row) if cell.key in keys], "below": _below(comparison, row)}
                 for row in comparison.rows]
        found.append({"columns": columns, "headings": [(name, len(its)) for name, its in part],
                      "lines": [line for line in lines if line["row"].failed or any(cell.value is not None for cell in line["cells"])]})
    return found


def _below(comparison: Comparison, row: Row) -> str:
    """The small line under a row's name: what it is, or what its budget was."""
    if row.kind == "base":
        return "the floor"
    if row.kind == "truth":
        return "as the prompts ask: what is possible"
    if row.kind == "real":
        return "against each other: the ceiling"
    if row.failed:
        return ""
    if comparison.cells:
        many = max((score.n or 0 for score in row.costs.values()), default=0) or len(row.cells)
        return f"{many} runs" if many else ""
    steps, pictures = row.manifest.get("steps"), row.manifest.get("pictures_seen")
    parts = [f"{steps:,} steps" if steps else "", f"{pictures:,} pictures seen" if pictures else ""]
    extra = (row.manifest.get("seconds") or {}).get("class_images")
    parts.append(f"class pictures {words.seconds(extra)}" if extra else "")
    return ", ".join(part for part in parts if part)


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
        return runs.hide(Path(value).name if Path(value).is_absolute() else value)
    return runs.hide(", ".join(map(str, value)) if isinstance(value, list) else str(value), assigned=False)


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
    return {"commands": [runs.hide(one) for one in commands], "versions": versions, "devices": list(dict.fromkeys(str(one["device"]) for one in manifests if one.get("device"))),
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
