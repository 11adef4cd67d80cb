"""`finetune generate`: pictures from prompts, from pictures, with artifacts, and sheets of many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.cli import generate_artifacts as artifacts
from finetune.cli import generate_inputs as inputs
from finetune.cli import generate_like, png
from finetune.cli.generate_plan import Axis, Job, Sheets, axis, plan
from finetune.errors import Problem
from finetune.settings import RunSettings, setting
from finetune.settings.resolve import build

SAMPLING = {"toybox": (25, 4.0)}  # steps, guidance; measured on the embedded base
OTHERS = (30, 7.5)  # what Stable Diffusion is usually sampled with
DENOISING = {"inpainting": 1.0}  # an inpainting model sees the picture beside the noise; others must begin from it
DENOISING_OTHERS = 0.75


class Settings(RunSettings):
    """What `finetune generate` takes."""

    prompt: list[str] = setting([], "prompt, may be repeated; reads (word:1.2), <lora:NAME:0.8>, <hypernet:NAME> and learned words", group="what")
    prompts_file: Path | None = setting(None, "a file with one prompt a line; lines that begin with # are passed over", group="what")
    negative: str = setting("", "what to steer away from", group="what")
    artifact: list[str] = setting([], "artifact folder or file, PATH or PATH:STRENGTH; may be repeated", group="what")
    strength: list[float] = setting([], "how much of each artifact; one for all or one each [default: 1]", group="what")
    artifacts_dir: Path | None = setting(None, "folder in which artifacts named in prompts are looked up, and never outside it", group="what")
    count: int = setting(1, "pictures of each prompt, with seeds SEED, SEED+1, ...", unit="pictures", group="what", ge=1)
    like: Path | None = setting(None, "a PNG made by this command or by a web UI: repeat it; flags beside it change one thing or another", group="what")

    init_image: Path | None = setting(None, "a picture to begin from", group="from a picture")
    denoising_strength: float | None = setting(
        None, "share of the way that is noised and walked again; 1 is text to picture [default: 0.75; 1 for inpainting models]", group="from a picture")
    mask: Path | None = setting(None, "as large as --init-image: white is painted anew, black stays to the bit", group="from a picture")
    depth: Path | None = setting(
        None, "for depth models: a depth map, near things bright; with --depth-model a picture to take one from", group="from a picture")
    depth_model: Path | None = setting(
        None, "folder of a transformers depth estimator; takes --depth, or else --init-image, as its picture", group="from a picture")

    steps: int | None = setting(None, "sampler steps [default: 25 for toybox, else 30]", group="sampling", ge=1)
    guidance: float | None = setting(
        None, "classifier-free guidance scale; 1 is off [default: 4 for toybox, else 7.5]", group="sampling", ge=0, le=1000)
    sampler: Literal["dpm++", "dpm++-sde", "unipc", "euler", "euler-a", "ddim", "ddpm"] = setting(
        "dpm++", "sampler, as diffusers implements it; dpm++ is DPM++ 2M", group="sampling")
    spacing: Literal["trailing", "leading", "linspace"] | None = setting(
        None, "where the timesteps lie; trailing suits few steps [default: the model's own]", group="sampling")
    karras: bool = setting(False, "noise levels of Karras et al. instead of a spacing", group="sampling")
    clip_skip: int = setting(1, "text encoder layer to read: 1 the last, 2 the one before", group="sampling", ge=1)
    size: str | None = setting(None, "WIDTHxHEIGHT, or one side of a square [default: the init picture's shape, or the model's own]", group="sampling")
    batch: int = setting(1, "pictures rendered together: faster on a GPU, and other only in the last bit", unit="picture", group="sampling", ge=1)

    grid: bool = setting(False, "also write grid.png: a row for each prompt, a column for each seed", group="sheets")
    x: str | None = setting(
        None, "columns of a labelled sheet, AXIS=V1,V2,...: seed, steps, guidance, sampler, strength, denoising-strength, artifact, prompt "
              "(prompts split by |)", group="sheets")
    y: str | None = setting(None, "rows of a labelled sheet, likewise", group="sheets")
    output: Path = setting(Path("pics"), "folder for the pictures", group="run")


def run(settings: Settings, console: Console) -> None:
    """Render and write NN-SEED.png files and sheets; print their paths."""
    given = set(settings.model_fields_set)
    x, y = (axis(f"--{side}", told, given, settings.artifacts_dir) if told else None for side, told in (("x", settings.x), ("y", settings.y)))
    found = generate_like.Like()
    if settings.like:
        crossed = {one.name.replace("-", "_") for one in (x, y) if one}
        found = generate_like.read(settings.like, given | crossed, settings.artifacts_dir, console)
        settings = build(Settings, {key: getattr(settings, key) for key in given} | found.values)  # what a picture says must be possible, too
    told = prompts_told(settings, (x, y), found, console)
    pictures = inputs.read(settings)
    location = inputs.check(settings, (x, y), pictures)
    jobs, sheets = jobs_of(settings, list(told), (x, y), told, found, location)
    drawn = render_all(settings, jobs, pictures, console)
    if settings.grid or x or y:
        write_sheets(settings, jobs, sheets, drawn, console)


def prompts_told(settings: Settings, axes: tuple[Axis | None, ...], found: generate_like.Like,
                 console: Console) -> dict[str, tuple[str, tuple[artifacts.Artifact, ...]]]:
    """Each prompt as written -> its text without tags, and the artifacts it names.

    Raises:
        Problem: there is no prompt, or one names what is not there.
    """
    along = next((one for one in axes if one and one.name == "prompt"), None)
    prompts = [str(value) for value in along.values] if along else inputs.prompts(settings)
    if not prompts:
        raise Problem("No prompt was given.", "There is nothing to render.", 'Add --prompt "a photo of a backpack on the beach".')
    told = {}
    for prompt in prompts:
        if found.named is not None and not along:
            from finetune.model import tags

            told[prompt] = (tags.find(prompt)[0], tuple(found.named))
            continue
        text, named, notes = artifacts.of_prompt(prompt, settings.artifacts_dir)
        told[prompt] = (text, tuple(named))
        for note in notes:
            console.print(f"Note: {note}", style="yellow", soft_wrap=True)
    return told


def jobs_of(settings: Settings, prompts: list[str], axes: tuple[Axis | None, Axis | None], told: dict[str, Any], found: generate_like.Like,
            location: Any) -> tuple[list[Job], Sheets]:
    """Every picture to render, and the sheets they make."""
    steps, guidance = SAMPLING.get(location.family, OTHERS)
    usual = DENOISING.get(location.variant, DENOISING_OTHERS) if settings.init_image else 1.0
    fixed = artifacts.of_flags(settings.artifact, settings.strength, settings.artifacts_dir)
    if found.artifacts is not None:
        fixed = [replace(one, strength=settings.strength[0]) for one in found.artifacts] if settings.strength else found.artifacts
    first = Job(1, "", "", tuple(fixed), settings.seed, settings.steps or steps, guidance if settings.guidance is None else settings.guidance,
                settings.sampler, usual if settings.denoising_strength is None else settings.denoising_strength)
    seeds = [settings.seed + extra for extra in range(settings.count)]
    return plan(first, prompts, seeds, *axes, told)


def render_all(settings: Settings, jobs: list[Job], pictures: inputs.Pictures, console: Console) -> dict[tuple[int, int, int], Any]:
    """Render the jobs, each set of artifacts on a base of its own, write every picture as soon as it is there; pictures by place."""
    from finetune.model import render
    from finetune.model.canvas import size_of

    drawn: dict[tuple[int, int, int], Any] = {}
    said: set[Any] = set()
    with bar(console, "rendering", len(jobs)) as progress:
        for chosen in dict.fromkeys(job.artifacts for job in jobs):
            ready = artifacts.load(settings.model, settings.device, settings.precision, chosen)
            mine = [replace(job, text=artifacts.spelled(job.text, ready, chosen)) for job in jobs if job.artifacts == chosen]
            inputs.notes(ready, chosen, mine, said, console)
            height, width = size_of(ready.base.resolution, ready.base.pixels_per_latent, inputs.size(settings.size), pictures.init)
            shared = {"negative": settings.negative, "size": (height, width), "spacing": settings.spacing, "karras": settings.karras,
                      "clip_skip": settings.clip_skip}
            common = inputs.facts(settings, ready, chosen, f"{width}x{height}")
            for together in chunks(mine, settings.batch):
                one = together[0]
                for job, picture in zip(together, render(
                        ready.base, [job.text for job in together], [job.seed for job in together], steps=one.steps, guidance=one.guidance,
                        sampler=one.sampler, init=pictures.init, strength=one.strength, mask=pictures.mask, depth=pictures.depth, weighted=True,
                        batch=settings.batch, **shared), strict=True):
                    path = settings.output / job.file
                    png.write(path, picture, common | inputs.facts_of_job(job))
                    drawn[job.place] = picture
                    console.print(str(path), soft_wrap=True)
                progress(len(drawn))
            del ready
    return drawn


def chunks(jobs: list[Job], most: int) -> Iterator[list[Job]]:
    """Neighbours that differ in prompt and seed alone, at most `most` at a time."""
    together: list[Job] = []
    for job in jobs:
        if together and (len(together) == most or (job.steps, job.guidance, job.sampler, job.strength) !=
                         (together[0].steps, together[0].guidance, together[0].sampler, together[0].strength)):
            yield together
            together = []
        together.append(job)
    yield together


def write_sheets(settings: Settings, jobs: list[Job], sheets: Sheets, drawn: dict[tuple[int, int, int], Any], console: Console) -> None:
    """grid.png, or grid-1.png, ... where there is more than two axes' worth."""
    from finetune.cli.generate_sheet import sheet

    for page, title in enumerate(sheets.titles):
        cells: list[list[Any]] = [[None] * len(sheets.columns) for _ in sheets.rows]
        for job in jobs:
            if job.place[0] == page:
                cells[job.place[1]][job.place[2]] = drawn[job.place]
        path = settings.output / ("grid.png" if len(sheets.titles) == 1 else f"grid-{page + 1}.png")
        named = {"sheet": {"title": title, "columns": list(sheets.columns), "rows": list(sheets.rows),
                           "files": [job.file for job in jobs if job.place[0] == page]}}
        png.write(path, sheet(cells, list(sheets.columns), list(sheets.rows), title), named, text=title)
        console.print(str(path), soft_wrap=True)


@contextlib.contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, silence elsewhere; yields what to call with the number done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
