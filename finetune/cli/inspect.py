"""`finetune inspect FILE`: what an artifact, run folder, model or picture is, who reads it, what would go wrong where, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune.errors import Problem
from finetune.settings import setting

if TYPE_CHECKING:
    from finetune.formats.inspection import Report

STYLES = {"yes": "green", "with care": "yellow", "no": "red"}
WIDEST = 100  # longer lines are hard to read
LABELS = 13
INDENT = (0, 0, 0, 1)


class Settings(BaseModel):
    """What `finetune inspect` takes."""

    model_config = ConfigDict(extra="forbid")

    path: Path = setting(..., "file or folder: an artifact, a run, a LoRA, an embedding, a hypernetwork, a model, a picture", group="arguments")
    check: bool = setting(False, "read every value too and hold the file against the acceptance list of docs/formats.md", group="what")
    as_json: bool = setting(False, "print everything as JSON, for programs", group="what", flag="--json")


def run(settings: Settings, console: Console) -> None:
    """Print what it is, which base it fits, and what reads it. Runs no code of the file."""
    from finetune.formats.inspect import inspect
    from finetune.formats.inspection import as_json

    path = settings.path.expanduser()
    if not path.exists():
        raise Problem(f"There is no file or folder {path}.", "", "Check the path.")
    report = inspect(path)
    found = accepted(report) if settings.check else {}
    if settings.as_json:
        told = as_json(report)
        console.out(json.dumps({**told, "acceptance": found} if settings.check else told, indent=2, ensure_ascii=False), highlight=False)
        return
    console.width = min(console.width, WIDEST)
    show(report, console)
    if settings.check:
        section("Acceptance list", console)
        for name, texts in found.items():
            console.print(Padding(Text(f"{name}: " + ("meets it" if not texts else ""), "green" if not texts else "bold"), (0, 1)))
            for text in texts:
                bullet(text, console)


def show(report: Report, console: Console) -> None:
    """The whole page of one file, or of a folder and the files in it."""
    from finetune.formats.inspection import facts

    console.print(Text(report.path.name or str(report.path), "bold cyan"), Text(f"  {report.title()}"), soft_wrap=True)
    console.print(Padding(grid(list(facts(report))), INDENT))
    if report.readers:
        section("Who can read it", console)
        console.print(Padding(readers(report), INDENT))
    parts = [child for child in report.children if child.readers]
    if len(parts) == 1:  # a folder around one thing
        section(f"{parts[0].path.name}: {parts[0].title()}", console)
        console.print(Padding(grid(list(facts(parts[0]))), INDENT))
        section("Who can read it", console)
        console.print(Padding(readers(parts[0]), INDENT))
    elif parts:
        section("Files", console)
        console.print(Padding(grid([(part.path.name, brief(part)) for part in parts]), INDENT))
        section("Who can read what", console)
        console.print(Padding(matrix(parts), INDENT))
    warnings = [(None, text) for text in report.warnings] + [(child, text) for child in report.children for text in child.warnings]
    if warnings:
        section("What would go wrong", console)
        for text, names in merged(warnings).items():
            bullet((f"{', '.join(names)}: " if names else "") + text, console)
    remedies = [*report.remedies, *(remedy for child in report.children for remedy in child.remedies)]
    if remedies:
        section("What to do", console)
        for purpose, command in remedies:
            console.print(Padding(Text(purpose, "dim"), (0, 2)))
            console.print("  " + command, style="cyan", soft_wrap=True)  # whole, so that it can be copied
    for child in report.children:
        if child.children:
            console.print()
            show(child, console)
    if len(parts) > 1:
        console.print()
        console.print(Text("Each file in full: finetune inspect FILE", "dim"))


def section(title: str, console: Console) -> None:
    """A heading with a line of space above."""
    console.print()
    console.print(Text(title, "bold"))


def bullet(text: str, console: Console) -> None:
    """One finding, indented below its dash."""
    table = Table.grid(padding=(0, 1))
    table.add_row(Text("-", "yellow"), Text(text, overflow="fold"))
    console.print(Padding(table, (0, 2)))


def grid(rows: list[tuple[str, str]]) -> Table:
    """Labels and texts in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=LABELS)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label, "dim"), Text(text, overflow="fold"))
    return table


def readers(report: Report) -> Table:
    """Program, verdict, and how the file is chosen there."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=LABELS)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for reader in report.readers:
        table.add_row(Text(reader.program), Text(reader.verdict, STYLES[reader.verdict]), Text(reader.text, overflow="fold"))
    return table


def brief(report: Report) -> str:
    """Kind, rank or vectors, and size of one of several files."""
    alphas = ", ".join(f"{alpha:g}" for alpha in report.alphas)
    parts = [report.title(), f"rank {', '.join(map(str, report.ranks))}" + (f", alpha {alphas}" if alphas else "") if report.ranks else "",
             f"{report.vectors} vectors of width {report.width}" if report.vectors else "", f"{report.bytes:,} bytes"]
    return "; ".join(filter(None, parts))


def matrix(parts: list[Report]) -> Table:
    """Files by programs, verdicts alone."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for reader in parts[0].readers:
        table.add_column(reader.program.replace("AUTOMATIC1111", "A1111"), header_style="dim", no_wrap=True)
    for part in parts:
        cells = [Text(reader.verdict.removeprefix("with "), STYLES[reader.verdict]) for reader in part.readers]
        table.add_row(Text(part.path.name), *cells)
    return table


def merged(warnings: list[tuple[Report | None, str]]) -> dict[str, list[str]]:
    """Sentences, each once, with the names of the files it is said of; none where it is said of the whole."""
    found: dict[str, list[str]] = {}
    for part, text in warnings:
        found.setdefault(text, []).extend([] if part is None else [part.path.name])
    return found


def accepted(report: Report) -> dict[str, list[str]]:
    """File name to what is wrong with it by the acceptance list; files of which the list does not speak are left out."""
    from finetune.formats.acceptance import check

    found: dict[str, list[str]] = {}
    for part in [report, *report.children]:
        try:
            found[part.path.name] = [f"Point {finding.point}: {finding.text}" for finding in check(part.path)]
        except Problem:
            for child in part.children:
                found |= accepted(child)
    return found
