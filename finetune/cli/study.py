"""`finetune compare --subjects ... --seeds K`: one cell for each subject and training seed, then the numbers across them.

    OUT/comparison.json    the usual, and the cells
    OUT/cells/SUBJECT-sN/  an ordinary comparison, complete with its report: subject SUBJECT, training seed N
    OUT/pictures/SUBJECT/  what it learns from, where the program drew or chose the pictures
    OUT/scores.json        scores, pairs, ranks and wins across the cells

Training seeds are SEED, SEED+1, ...; the evaluation's seed is SEED for all, so that rows are paired picture by picture and
the untouched base is rendered once for each class noun. Finished rows and evaluations are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from finetune import runs
from finetune.cli import budget as budgets
from finetune.cli import jobs
from finetune.cli import report as report_verb
from finetune.cli.cell import Cell, build, changed, first_pictures, share_base, todos
from finetune.cli.compare import budgeted, common, job, notes, tell_failures
from finetune.cli.compare_settings import CompareSettings
from finetune.cli.evaluate import check, scored
from finetune.cli.rows import plan
from finetune.cli.subjects import Whose, bring, subjects
from finetune.errors import Problem
from finetune.model import family_of
from finetune.report import words

EVALUATION = "evaluation"
SHARED = ("model", "family", "model_hash", "seed", "device", "suite", "judge", "sampler", "budget", "workers")


def run(settings: CompareSettings, console: Console) -> None:
    """The whole study."""
    family = family_of(settings.model)
    whose = subjects(settings, family)
    cells, budget = plan_cells(settings, family, whose, console)
    announce(settings, cells, budget, console)
    unscored = work(settings.output, cells, settings.workers, console)
    failed = [(f"{cell.name}, {row.name}", trouble) for cell in cells for row, trouble in cell.failed] + unscored
    if not any(cell.finished for cell in cells):
        raise Problem("No row was trained.", failed[0][1] if failed else "", "Mend it; running the same command again goes on from here.")
    conclude(settings.output, console)
    tell_failures(failed, console)


def plan_cells(settings: CompareSettings, family: str, whose: list[Whose], console: Console) -> tuple[list[Cell], budgets.Budget]:
    """All cells, in the order of subjects and seeds, with what the budget gives their rows; nothing is trained yet but probes."""
    plan(changed(settings, subjects=None, class_noun=whose[0].noun or None), family_of)  # refuses what is wrong in the rows first
    places: dict[str, Path | None] = {}
    for one in whose:
        check(settings, family, one.noun)
        places[one.name] = bring(one, settings.output, settings.pictures)
    plain = [(one, number) for one in whose for number in range(settings.seeds)]
    cells: list[Cell] = []
    budget = None
    for one, number in plain:
        own = own_settings(settings, one, places[one.name], number)
        cell = build(own, family, evaluation_seed=settings.seed, subject=one.name, known=one.known)
        budget = budget or budgets.measure(cell, console, settings.output)
        cells.append(budgeted(cell, budget))
    assert budget is not None
    return cells, budget


def own_settings(settings: CompareSettings, whose: Whose, folder: Path | None, number: int) -> CompareSettings:
    """The settings of one cell: its noun, its pictures, its seed, its folder."""
    seed = settings.seed + number
    own: dict[str, object] = {key: value for key, value in whose.settings.items() if getattr(settings, key) is None}
    own |= {"subjects": None, "seeds": 1, "class_noun": whose.noun or None, "seed": seed, "output": settings.output / "cells" / f"{whose.name}-s{seed}"}
    if folder is not None:
        own["instance_dir"] = folder
    cell = changed(settings, **own)
    return changed(cell, pictures=None) if whose.known else first_pictures(cell, settings.output / "pictures" / whose.name)


def announce(settings: CompareSettings, cells: list[Cell], budget: budgets.Budget, console: Console) -> None:
    """What will be compared, on whom, and under which budget."""
    names = list(dict.fromkeys(cell.subject for cell in cells))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("subjects", f"{len(names)}: {', '.join(names)}")
    table.add_row("seeds", f"{settings.seed} to {settings.seed + settings.seeds - 1} for training, {settings.seed} for evaluation")
    counts = sorted({len(cell.pictures) for cell in cells})
    table.add_row("pictures", f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} of each subject")
    table.add_row("budget", f"{budgets.sentence(budget)} each")
    common(table, cells[0], budget)
    table.add_row("cells", f"{len(cells)}, {len(cells[0].rows)} rows each")
    table.add_row("folder", str(settings.output))
    console.print(table)
    notes(cells[0], console)


def work(output: Path, cells: list[Cell], workers: int, console: Console) -> list[tuple[str, str]]:
    """Train and evaluate what is not done, every subject with the first seed before any with the second.

    Returns: evaluations that failed, with the reason.
    """
    found: list[jobs.Job] = []
    first: dict[str, tuple[Cell, jobs.Job | None]] = {}
    failed: list[tuple[str, str]] = []
    kept = 0
    for cell in sorted(cells, key=lambda cell: cell.settings.seed):
        todo = todos(cell)
        for row in (row for row in cell.rows if todo[row.name] is None):
            cell.note(row, None)
            kept += 1
        mine = [job(cell, row, flag) for row in cell.rows if (flag := todo[row.name]) is not None]
        source, before = first.get(cell.settings.class_noun or "", (cell, None))
        if not mine and scored(cell.folder):
            kept += 1
            first.setdefault(cell.settings.class_noun or "", (cell, None))
            continue
        last = evaluation(output, cells, cell, source, failed)
        last.after = [*mine, *([before] if before else [])]
        first.setdefault(cell.settings.class_noun or "", (cell, last))
        found += [*mine, last]
    if kept:
        console.print(f"Kept: {kept} rows and evaluations are finished with these settings.")
    write(output, cells)
    if found:
        with Board(console, cells, found, workers) as board:
            jobs.run(found, workers, board.ended, board.began)
    return failed


def evaluation(output: Path, cells: list[Cell], cell: Cell, source: Cell, failed: list[tuple[str, str]]) -> jobs.Job:
    """Pictures, scores and report of one cell as a job; the base's pictures come from `source` where they are the same."""

    def words() -> list[str] | None:
        if not cell.finished:
            return None
        if source is not cell:
            share_base(source, cell)
        return ["evaluate", str(cell.folder)]

    def done(trouble: str | None) -> None:
        if trouble:
            failed.append((f"{cell.name}, evaluation", trouble))
        write(output, cells)

    return jobs.Job(EVALUATION, EVALUATION, cell.name, words, cell.folder / "logs" / f"{EVALUATION}.log", done)


def write(output: Path, cells: list[Cell]) -> None:
    """OUT/comparison.json with every cell in which a row is finished; rows that no cell finished stand under `failed`."""
    there = [cell for cell in cells if cell.finished]
    if not there:
        return
    told = [cell.file() for cell in there]
    rows = {row["row"]: {key: row[key] for key in ("row", "title", "method")} for one in told for row in one["rows"]}
    order = {row.name: place for place, row in enumerate(cells[0].rows)}
    missing = [{"cell": cell.name, "row": row.name, "title": row.title, "method": row.method, "error": trouble}
               for cell in cells for row, trouble in cell.failed]
    never = {one["row"]: {key: one[key] for key in ("row", "title", "method", "error")} for one in missing if one["row"] not in rows}
    runs.write_json(output / "comparison.json", {
        **{key: told[0][key] for key in SHARED if key in told[0]},
        "rows": sorted(rows.values(), key=lambda row: order.get(row["row"], len(order))), "failed": list(never.values()), "missing": missing,
        "cells": [{"name": cell.name, "subject": cell.subject, "class_noun": cell.settings.class_noun, "seed": cell.settings.seed,
                   "folder": cell.folder.relative_to(output).as_posix()} for cell in there]})


def conclude(folder: Path, console: Console) -> None:
    """Put the scored cells together, write the report, print the table across them."""
    from finetune.evaluation import study

    study.aggregate(folder)
    report_verb.show(folder, console)


class Board:
    """What is done and how long the rest will take: a line for each row that ends, and a bar below on a terminal."""

    def __init__(self, console: Console, cells: list[Cell], found: list[jobs.Job], workers: int):
        self._console, self._workers = console, workers
        self._numbers = {cell.name: number for number, cell in enumerate(sorted(cells, key=lambda cell: cell.settings.seed), 1)}
        self._waiting = list(found)
        self._took: dict[str, list[float]] = {}
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
                             console=console, disable=not console.is_terminal, transient=True)
        self._task: TaskID = self._bar.add_task("", total=len(found), left="")

    def __enter__(self) -> Board:
        self._console.print(f"[dim]{'cell':<6} {'subject and seed':<22} {'row':<22} {'took':>11}  left[/]")
        self._bar.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._bar.stop()

    def began(self, job: jobs.Job) -> None:
        """Show what runs."""
        self._bar.update(self._task, description=f"cell {self._numbers[job.cell]} of {len(self._numbers)}: {job.title}")

    def ended(self, job: jobs.Job, trouble: str | None, seconds: float) -> None:
        """One line: which cell of how many, what it was, how long it took, how long the rest will take."""
        self._waiting.remove(job)
        self._took.setdefault(job.kind, []).append(seconds)
        left = lasting(self.left()) if self._waiting else "done"
        place = f"{self._numbers[job.cell]}/{len(self._numbers)}"
        took = "failed" if trouble else lasting(seconds)
        self._console.print(f"{place:<6} {job.cell[:22]:<22} {job.title[:22]:<22} {took:>11}  {left}", style="red" if trouble else None)
        self._bar.update(self._task, advance=1, left=f"{left} left" if self._waiting else "")

    def left(self) -> float:
        """Seconds that the waiting jobs will take: the mean of their kind so far, else of all kinds."""
        means = {kind: sum(took) / len(took) for kind, took in self._took.items()}
        usual = sum(means.values()) / len(means)
        return sum(means.get(job.kind, usual) for job in self._waiting) / self._workers


def lasting(seconds: float) -> str:
    """A time in whole seconds: `7 s`, `12 min 5 s`."""
    return words.seconds(max(1, round(seconds))).replace(".0 s", " s")
