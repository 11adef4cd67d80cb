"""`finetune compare`: train several methods on the same pictures, draws and budget, score them, write the report."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune.cli import budget as budgets
from finetune.cli import jobs, processes
from finetune.cli.cell import Cell, build, first_pictures, recipe, todos
from finetune.cli.compare_settings import CompareSettings
from finetune.cli.evaluate import check, judge_and_show
from finetune.cli.failures import UNEXPECTED
from finetune.cli.rows import Row, plan, unfair
from finetune.errors import Problem
from finetune.model import family_of

Settings = CompareSettings
EQUALISED = {"seconds": ("steps",), "memory": ("batch_size", "accumulate")}  # where rows differ because the budget says so


def run(settings: CompareSettings, console: Console) -> None:
    """The whole comparison. Finished rows with the same settings, pictures and base are kept."""
    budgets.check(settings)
    with processes.locked(settings.output):
        if settings.subjects or settings.seeds > 1:
            from finetune.cli import study

            study.run(settings, console)
        else:
            one(settings, console)


def one(settings: CompareSettings, console: Console) -> None:
    """One subject, one training seed."""
    family = family_of(settings.model)
    plan(settings, family_of)  # refuses what is wrong in the rows before pictures are looked at
    cell = build(first_pictures(settings, settings.output / "pictures"), family)
    check(cell.settings, family, cell.settings.class_noun or "")
    budget = budgets.measure(cell, console, settings.output)
    cell = budgeted(cell, budget)
    announce(cell, budget, console)
    todo = todos(cell)
    if settings.workers > 1:
        together(cell, todo, console)
    else:
        in_turn(cell, todo, console)
    if not cell.finished:
        raise Problem("No row was trained.", " ".join(f"{row.name}: {trouble}" for row, trouble in cell.failed),
                      "Mend the first one; running the same command again goes on from here.")
    judge_and_show(settings.output, console)
    tell_failures([(row.name, trouble) for row, trouble in cell.failed], console)


def budgeted(cell: Cell, budget: budgets.Budget) -> Cell:
    """The cell with what the budget gave each row; rows that do not fit have failed already."""
    settings = budget.applied(cell.settings)
    rows = plan(settings, family_of) if budget.rows else cell.rows
    extra = {"budget": budget.told, **({"workers": settings.workers} if settings.workers > 1 else {})}
    fit = [row for row in rows if row.name not in budget.unfit]
    failed = [(row, budget.unfit[row.name]) for row in rows if row.name in budget.unfit]
    return Cell(settings, cell.family, fit, cell.pictures, cell.evaluation_seed, cell.subject, cell.known, extra, failed=failed)


def announce(cell: Cell, budget: budgets.Budget, console: Console) -> None:
    """What will be compared, and under which budget."""
    settings = cell.settings
    table = Table.grid(padding=(0, 2))
    if cell.rows:
        side = cell.rows[0].settings.resolution
        table.add_row("pictures", f"{len(cell.pictures)} of a {settings.class_noun}, {side} x {side} pixels")
    table.add_row("budget", f"{budgets.sentence(budget)} each, seed {settings.seed}")
    common(table, cell, budget)
    table.add_row("folder", str(settings.output))
    console.print(table)
    notes(cell, console)


def common(table: Table, cell: Cell, budget: budgets.Budget) -> None:
    """Lines that a comparison and a study share: what each row got, the base, the rows, the workers."""
    for name, own in budget.told.get("rows", {}).items():
        table.add_row("", f"{name}: {budgets.described(own)}")
    table.add_row("base", cell.settings.model)
    table.add_row("rows", ", ".join(row.name for row in cell.rows))
    if cell.settings.workers > 1:
        table.add_row("workers", f"{cell.settings.workers} at once: their times are those of a shared machine")


def notes(cell: Cell, console: Console) -> None:
    """Say aloud where rows differ in their budget without being asked to."""
    kind = cell.settings.budget
    for sentence in unfair(cell.rows, EQUALISED.get(kind, ())):
        console.print(f"Note: {sentence}", style="yellow")


def in_turn(cell: Cell, todo: dict[str, str | None], console: Console) -> None:
    """One row after another, each on our own terminal."""
    for number, row in enumerate(cell.rows, 1):
        console.rule(f"[{number}/{len(cell.rows)}] {row.title}", style="dim")
        trouble = None
        flag = todo[row.name]
        if flag is None:
            console.print(f"Kept: {cell.folder / row.name} is finished with these settings.", soft_wrap=True)
        else:
            trouble = processes.train(*words(cell, row, flag))
        cell.note(row, trouble)


def together(cell: Cell, todo: dict[str, str | None], console: Console) -> None:
    """Several rows at once, their output in OUT/logs."""
    for row in cell.rows:
        if todo[row.name] is None:
            console.print(f"Kept: {cell.folder / row.name} is finished with these settings.", soft_wrap=True)
            cell.note(row, None)

    def ended(job: jobs.Job, trouble: str | None, seconds: float) -> None:
        console.print(f"{job.title}: {'failed' if trouble else f'{seconds:.0f} s'}, {job.log}", soft_wrap=True)

    jobs.run([job(cell, row, todo[row.name] or "") for row in cell.rows if todo[row.name] is not None], cell.settings.workers, ended)


def words(cell: Cell, row: Row, flag: str) -> list[str]:
    """What trains a row: `finetune WORDS`. Of a row that has finished nobody needs the checkpoint."""
    return [row.method, "--recipe", str(recipe(cell, row)), "--keep-checkpoints", "0", *([flag] if flag else [])]


def job(cell: Cell, row: Row, flag: str) -> jobs.Job:
    """The training of one row as a job."""
    return jobs.Job(row.name, row.name, cell.name, lambda: words(cell, row, flag), cell.folder / "logs" / f"{row.name}.log", lambda trouble: cell.note(row, trouble))


def tell_failures(failed: list[tuple[str, str]], console: Console) -> None:
    """Name every row that failed; the exit code says so too."""
    for name, trouble in failed:
        console.print(f"[bold red]Failed:[/] {name}: {escape(trouble)}", soft_wrap=True)
    if failed:
        raise typer.Exit(UNEXPECTED)
