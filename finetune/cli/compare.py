"""`finetune compare`: train several methods on the same pictures, draws and budget, score them, write the report."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetune import runs
from finetune.cli import processes, quiet
from finetune.cli.compare_settings import CompareSettings
from finetune.cli.evaluate import check, judge_and_show, judge_of, sampler_of, suite_of_settings
from finetune.cli.failures import UNEXPECTED
from finetune.cli.rows import Row, plan, recipe_text, same, unfair
from finetune.errors import Problem
from finetune.model import family_of

Settings = CompareSettings


def run(settings: CompareSettings, console: Console) -> None:
    """The whole comparison. Finished rows with the same settings, pictures and base are kept."""
    if not settings.class_noun:
        raise Problem("No class noun was given.", "The base, which has never seen the subject, is asked for the plain word.",
                      "Add --class-noun dog (or backpack, watercolor, ...).")
    family = family_of(settings.model)
    rows = plan(settings, family_of)
    pictures = pictures_of(rows[0], settings.output)
    check(settings, family, settings.class_noun)
    announce(settings, rows, pictures, console)
    finished: list[Row] = []
    failed: list[tuple[Row, str]] = []
    todo = todos(settings, rows, pictures)
    for number, row in enumerate(rows, 1):
        console.rule(f"[{number}/{len(rows)}] {row.title}", style="dim")
        trouble = None
        if todo[row.name] is None:
            console.print(f"Kept: {settings.output / row.name} is finished with these settings.", soft_wrap=True)
        else:
            trouble = train(row, settings.output, todo[row.name])
        if trouble:
            failed.append((row, trouble))
        else:
            finished.append(row)
            write_comparison(settings, family, finished, failed, pictures)
    if not finished:
        raise Problem("No row was trained.", " ".join(f"{row.name}: {trouble}" for row, trouble in failed),
                      "Mend the first one; running the same command again goes on from here.")
    write_comparison(settings, family, finished, failed, pictures)
    judge_and_show(settings.output, console)
    for row, trouble in failed:
        console.print(f"[bold red]Failed:[/] {row.name}: {escape(trouble)}", soft_wrap=True)
    if failed:
        raise typer.Exit(UNEXPECTED)


def pictures_of(row: Row, output: Path) -> list[dict[str, str]]:
    """Absolute path and hash of every picture; those of a data set are written to OUT/pictures first.

    Raises:
        Problem: no picture can be used.
    """
    from finetune.data import intake

    found = []
    for number, picture in enumerate(intake(row.settings).pictures):
        path = picture.path
        if path is None:
            path = output / "pictures" / f"{number:03d}.png"
            with runs.atomic_path(path) as temporary:
                picture.load().save(temporary)
        found.append({"path": str(Path(path).resolve()), "sha256": picture.sha256})
    return found


def announce(settings: CompareSettings, rows: list[Row], pictures: list[dict[str, str]], console: Console) -> None:
    """What will be compared, and under which budget."""
    first = rows[0].settings
    table = Table.grid(padding=(0, 2))
    table.add_row("pictures", f"{len(pictures)} of a {settings.class_noun}, {first.resolution} x {first.resolution} pixels")
    table.add_row("budget", f"{settings.steps} steps x {settings.batch_size * settings.accumulate} pictures each, seed {settings.seed}")
    table.add_row("base", settings.model)
    table.add_row("rows", ", ".join(row.name for row in rows))
    table.add_row("folder", str(settings.output))
    console.print(table)
    for sentence in unfair(rows):
        console.print(f"Note: {sentence}", style="yellow")


def todos(settings: CompareSettings, rows: list[Row], pictures: list[dict[str, str]]) -> dict[str, str | None]:
    """What each row needs: None (finished), "--resume", "--overwrite" or "" (never begun)."""
    found: dict[str, str | None] = {}
    base_hash = None
    for row in rows:
        folder = settings.output / row.name
        if not (folder / "settings.json").is_file():
            found[row.name] = "--overwrite" if folder.is_dir() else ""
            continue
        manifest = runs.read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
        kept = not settings.overwrite and same(row, runs.read_json(folder / "settings.json"))
        kept = kept and [one["sha256"] for one in manifest.get("pictures", [])] == [one["sha256"] for one in pictures]
        if kept:
            base_hash = base_hash or hash_of(settings.model)
            kept = manifest.get("model", {}).get("hash") == base_hash
        if kept and manifest.get("status") == "finished":
            found[row.name] = None
        else:
            found[row.name] = "--resume" if kept and any(folder.glob("checkpoints/*/manifest.json")) else "--overwrite"
    return found


def hash_of(model: str) -> str:
    """Hash of the base as the runs' manifests hold it."""
    from finetune.model import load

    quiet.libraries()
    return load(model).hash


def train(row: Row, output: Path, flag: str) -> str | None:
    """Train one row in its own process; one line when it failed."""
    recipe = output.resolve() / "recipes" / f"{row.name}.toml"
    runs.write_text(recipe, recipe_text(row))
    return processes.train(row.method, recipe, *([flag] if flag else []))


def write_comparison(settings: CompareSettings, family: str, rows: list[Row], failed: list[tuple[Row, str]],
                     pictures: list[dict[str, str]]) -> None:
    """comparison.json: what evaluation and report start from. Written after every row."""
    manifest = runs.read_json(settings.output / rows[0].name / "manifest.json")
    runs.write_json(settings.output / "comparison.json", {
        "model": settings.model, "family": family, "model_hash": manifest["model"]["hash"],
        "class_noun": settings.class_noun, "instance_files": [one["path"] for one in pictures],
        "rows": [{"row": row.name, "title": row.title, "method": row.method, "run": row.name, "subject": row.subject} for row in rows],
        "failed": [{"row": row.name, "title": row.title, "method": row.method, "error": trouble} for row, trouble in failed],
        "seed": settings.seed, "device": settings.device, "suite": suite_of_settings(settings),
        "judge": judge_of(settings), "sampler": sampler_of(settings, family),
    })

