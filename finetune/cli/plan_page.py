"""The plan as a page of 80 columns: first what everybody wants to know, then where it comes from."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune import methods
from finetune.cli.plan_rows import Page, Plan
from finetune.plan.reality import size

FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL", "toybox": "toybox", "other": "a base of its own kind"}
DOING = {"loading": "the base is loaded", "class pictures": "class pictures are rendered", "encoding": "pictures are encoded",
         "reading the UNet": "the UNet is read", "training": "steps are taken", "checkpoint": "a checkpoint is saved", "export": "the artifact is written"}


def show(page: Page, console: Console) -> None:
    """Print the page."""
    console.width = min(console.width, 80)
    for plan in page.full:
        _answer(page, plan, console)
        _memory(plan, console)
        _files(plan, console)
    if page.rows:
        _table(page, console)
    for name, why in page.refused.items():
        console.print(f"{name} cannot run like this: {why}", style="yellow")
    _doubts(page, console)


def _answer(page: Page, plan: Plan, console: Console) -> None:
    """Fits or not, time, memory, files, in one line each."""
    told, settings = plan.prediction, plan.settings
    batch = told.batch_size * told.accumulate
    console.print()
    console.print(Text.assemble((methods.get(told.method).title, "bold"), f" on {told.model} ({FAMILIES.get(told.family, told.family)}), {told.resolution} px, "
                                f"{batch} picture{'s' * (batch > 1)} a step, {settings.steps:,} steps, {'CPU' if told.device == 'cpu' else 'GPU'}"))
    lines = _grid()
    if plan.fits is not None:
        whose = f"the {size(page.limit)} of --memory-limit" if page.limit_given else f"{size(page.limit)}, nine tenths of what is free here"
        lines.add_row("fits", Text.assemble((("tight" if plan.tight else "yes") if plan.fits else "NO", "bold green" if plan.fits else "bold red"), f", in {whose}" if plan.fits else f", not in {whose}"))
    where = "on the GPU" if told.peak_device else f"while {DOING[told.moment]}"
    lines.add_row("memory", f"{size(told.peak)} at most, {where}" + (f"; {size(told.peak_host)} of the machine's own" if told.peak_device else ""))
    lines.add_row("time", _time(plan))
    if told.class_images:
        took = f", about {clock(plan.class_seconds)}" if plan.class_seconds is not None else ""
        lines.add_row("before that", f"{told.class_images} class pictures are rendered{took}, unless they are there from an earlier run")
    lines.add_row("artifact", f"{plan.artifact:,} bytes" if plan.artifact is not None else "")
    lines.add_row("disk", f"{size(sum(plan.disk.values()))}: " + ", ".join(f"{name} {size(value)}" for name, value in plan.disk.items()))
    console.print(Padding(lines, (0, 2)))


def _time(plan: Plan) -> str:
    if plan.step_seconds is None:
        return "not measured" + ("" if plan.prediction.device == "cpu" else ": on a GPU the first steps of a run tell")
    return f"about {clock(plan.step_seconds * plan.settings.steps)}: {clock(plan.step_seconds)} a step"


def _memory(plan: Plan, console: Console) -> None:
    """What fills the memory, and each moment."""
    told = plan.prediction
    lines = _grid()
    lines.add_row("trained", f"{told.trainable:,} numbers")
    for name, value, note in (
            ("frozen weights", told.weights, "networks that stay as they are"), ("trained weights", told.trained, ""), ("gradients", told.gradients, ""),
            ("optimizer", told.optimizer, plan.settings.optimizer), ("copies", told.copies, "a teacher or an average"),
            ("activations", told.activations, "kept from the forward for the backward pass"),
            ("the program", told.process, "measured: Python and the libraries")):
        if value:
            lines.add_row(name, f"{size(value):>8}  [dim]{note}[/dim]")
    console.print("\n[bold]What fills the memory[/bold]")
    console.print(Padding(lines, (0, 2)))
    moments = _grid()
    for name, value in told.moments.items():
        moments.add_row(f"{size(value):>8}", DOING[name])
    console.print("\n[bold]Memory of the process when[/bold]")
    console.print(Padding(moments, (0, 2)))


def _files(plan: Plan, console: Console) -> None:
    if plan.checkpoint is not None and plan.settings.checkpoint_every:
        console.print(f"\nA checkpoint has {plan.checkpoint:,} bytes and a short manifest; one every {plan.settings.checkpoint_every:,} steps, "
                      f"{plan.settings.keep_checkpoints} kept.")


def _table(page: Page, console: Console) -> None:
    """Rungs and methods."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    timed = any(plan.step_seconds is not None for plan in page.rows)
    for name, side in (("method", "left"), ("--memory", "left"), ("memory", "right"), *((("a step", "right"), ("in all", "right")) if timed else ()), ("fits", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    before = ""
    for plan in page.rows:
        told = plan.prediction
        times = (clock(plan.step_seconds), clock(plan.total_seconds)) if timed else ()
        fits = Text("") if plan.fits is None else Text("tight" if plan.tight else "yes", "green") if plan.fits else Text("no", "red")
        table.add_row("" if told.method == before else told.method, told.rung, size(told.peak), *times, fits)
        before = told.method
    console.print("\n[bold]Memory rungs and methods[/bold]")
    console.print(Padding(table, (0, 2)))


def _doubts(page: Page, console: Console) -> None:
    """How far all this can be off."""
    console.print("\n[dim]Artifact bytes are exact. Memory was within 15 % of runs that were measured (docs/plan.md); what fits by less than that is tight.[/dim]")
    if any(plan.step_seconds is not None for plan in page.full):
        console.print("[dim]Times were taken now on this machine, operator by operator: read them as a first idea; other work counts double.[/dim]")


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def clock(seconds: float | None) -> str:
    """Seconds for people: 0.12 s, 17 s, 3 min 20 s, 3 h 48 min, 2 days 4 h."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for large, small, unit, per, most in (("min", "s", 1, 60, 3600), ("h", "min", 60, 60, 86400), ("d", "h", 3600, 24, float("inf"))):
        if seconds < most:
            break
    whole, rest = divmod(round(seconds / unit), per)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
