"""`finetune generate`: pictures from prompts, with an artifact, several, or none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune import __version__, runs
from finetune.cli import quiet
from finetune.errors import Problem
from finetune.settings import RunSettings, setting

SAMPLING = {"toybox": (25, 4.0)}  # steps, guidance; measured on the embedded base
OTHERS = (30, 7.5)  # what Stable Diffusion 1.x and 2.x are usually sampled with


class Settings(RunSettings):
    """What `finetune generate` takes."""

    artifact: list[Path] = setting([], "artifact folder or file; may be repeated", group="what")
    strength: list[float] = setting([], "how much of each artifact; one for all or one each [default: 1]", group="what")
    prompt: list[str] = setting([], "prompt; may be repeated", group="what")
    negative: str = setting("", "what to steer away from", group="what")
    count: int = setting(1, "pictures of each prompt, with seeds SEED, SEED+1, ...", unit="pictures", group="what", ge=1)
    steps: int | None = setting(None, "sampler steps [default: 25 for toybox, else 30]", group="sampling", ge=1)
    guidance: float | None = setting(
        None, "classifier-free guidance scale; 1 is off [default: 4 for toybox, else 7.5]", group="sampling", ge=0)
    sampler: Literal["dpm++", "ddim", "ddpm", "euler", "unipc"] = setting("dpm++", "sampler, as diffusers implements it", group="sampling")
    size: int | None = setting(None, "side of the picture [default: the model's own]", unit="pixels", group="sampling", ge=8)
    batch: int = setting(8, "pictures rendered together; does not change them", group="sampling", ge=1)
    output: Path = setting(Path("pics"), "folder for the pictures", group="run")
    grid: bool = setting(False, "also write grid.png: a row for each prompt, a column for each seed", group="run")


def run(settings: Settings, console: Console) -> None:
    """Render and write PROMPT-SEED.png files; print their paths."""
    if not settings.prompt:
        raise Problem("No prompt was given.", "There is nothing to render.", 'Add --prompt "a photo of a backpack on the beach".')
    strengths = strength_of_each(settings)
    base, triggers = load(settings, strengths)
    for path, trigger in zip(settings.artifact, triggers, strict=True):
        if trigger and not any(trigger in prompt for prompt in settings.prompt):
            console.print(f"Note: no prompt contains {trigger!r}, the phrase {path} was trained with.", style="yellow", soft_wrap=True)
    jobs = [(number, prompt, settings.seed + extra) for number, prompt in enumerate(settings.prompt, 1) for extra in range(settings.count)]
    steps, guidance = sampling(settings, base.family)
    from finetune.model import render

    with bar(console, "rendering", len(jobs)) as progress:
        pictures = render(base, [prompt for _, prompt, _ in jobs], [seed for *_, seed in jobs], steps=steps, guidance=guidance,
                          negative=settings.negative, size=settings.size, batch=settings.batch, sampler=settings.sampler, progress=progress)
    shared = {"model": settings.model, "model_hash": base.hash, "artifacts": [str(path) for path in settings.artifact],
              "strengths": strengths, "negative": settings.negative, "steps": steps, "guidance": guidance, "sampler": settings.sampler,
              "finetune": __version__}
    for (number, prompt, seed), picture in zip(jobs, pictures, strict=True):
        path = settings.output / f"{number:02d}-{seed}.png"
        save(path, picture, {"prompt": prompt, "seed": seed, **shared})
        console.print(str(path), soft_wrap=True)
    if settings.grid:
        path = settings.output / "grid.png"
        save(path, grid(pictures, settings.count), {"prompts": settings.prompt, "seed": settings.seed, **shared})
        console.print(str(path), soft_wrap=True)


def strength_of_each(settings: Settings) -> list[float]:
    """One strength for each artifact."""
    given, wanted = settings.strength, len(settings.artifact)
    if len(given) not in (0, 1, wanted) or given and not wanted:
        raise Problem(f"{len(given)} strengths were given for {wanted} artifacts.", "Which belongs to which cannot be told.",
                      "Give --strength once for all, or once for each --artifact.")
    return given * wanted if len(given) == 1 else given or [1.0] * wanted


def load(settings: Settings, strengths: list[float]) -> tuple[Any, list[str | None]]:
    """The base with the artifacts on it, and the trigger phrase of each."""
    for path in settings.artifact:
        if not path.exists():
            raise Problem(f"There is no artifact at {path}.", "", "Name the `artifact` folder of a run, or a file in it.")
    import torch

    quiet.libraries()
    from finetune.methods import load_artifacts
    from finetune.model import load as load_base
    from finetune.model.base import pick_device

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    base = load_base(settings.model, pick_device(settings.device), kinds[settings.precision])
    return base, [loaded.trigger for loaded in load_artifacts(base, list(zip(settings.artifact, strengths, strict=True)))]


def sampling(settings: Settings, family: str) -> tuple[int, float]:
    """Sampler steps and guidance: what was given, else what suits the family."""
    steps, guidance = SAMPLING.get(family, OTHERS)
    return settings.steps or steps, guidance if settings.guidance is None else settings.guidance


def save(path: Path, picture: Any, facts: dict[str, Any]) -> None:
    """Write a PNG with what made it as text: each fact under its name, and all as JSON under `finetune.settings`."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for name, value in facts.items():
        text.add_itxt(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    text.add_itxt("finetune.settings", json.dumps(facts, ensure_ascii=False))
    with runs.atomic_path(path) as temporary:
        picture.save(temporary, pnginfo=text)


def grid(pictures: list[Any], across: int) -> Any:
    """All pictures on one sheet, `across` in a row."""
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * across, height * -(-len(pictures) // across)), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % across * width, place // across * height))
    return sheet


@contextlib.contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, silence elsewhere; yields what to call with the number done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
