"""What `finetune generate` is given besides flags: prompts from files, pictures, and what a picture will say of all that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetune import __version__
from finetune.cli import generate_artifacts as artifacts
from finetune.errors import Problem

if TYPE_CHECKING:
    from finetune.cli.generate import Settings
    from finetune.cli.generate_plan import Axis, Job

MOST_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
PATHS = ("init_image", "mask", "depth", "depth_model")


@dataclass(frozen=True)
class Pictures:
    """The pictures a rendering begins from, decoded; None where not given."""

    init: Any = None
    mask: Any = None
    depth: Any = None


def prompts(settings: Settings) -> list[str]:
    """Prompts of flags, then those of the file; each once.

    Raises:
        Problem: a file that cannot be read, or that holds none.
    """
    found = list(settings.prompt)
    if settings.prompts_file:
        try:
            lines = settings.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = "It is not UTF-8 text." if isinstance(error, UnicodeDecodeError) else "There is no such file."
            raise Problem(f"The prompts of {settings.prompts_file} cannot be read.", why, "Give a text file with one prompt a line.") from None
        own = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not own:
            raise Problem(f"{settings.prompts_file} holds no prompt.", "Empty lines and lines that begin with # do not count.",
                          "Write one prompt a line.")
        found += own
    return list(dict.fromkeys(found))


def size(told: str | None) -> tuple[int, int] | None:
    """`512x768` (width x height) or `512` as (height, width).

    Raises:
        Problem: neither.
    """
    if told is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,5})(?:\s*[xX×]\s*(\d{1,5}))?\s*", told)
    if not match or not int(match[1]) or match[2] and not int(match[2]):
        raise Problem(f"--size {told!r} is no size.", "It is a width and a height in pixels.", "Write --size 512x768, or --size 512 for a square.")
    return int(match[2] or match[1]), int(match[1])


def read(settings: Settings) -> Pictures:
    """Decode the pictures that were named; make a depth map where an estimator was.

    Raises:
        Problem: missing, unreadable or too large.
    """
    init, mask, depth = (open_picture(path, flag) for path, flag in (
        (settings.init_image, "--init-image"), (settings.mask, "--mask"), (settings.depth, "--depth")))
    if settings.depth_model:
        source = depth if depth is not None else init
        if source is None:
            raise Problem("--depth-model was given without a picture.", "It makes a depth map from one.", "Add --depth PICTURE or --init-image PICTURE.")
        from finetune.model.depth import estimate

        depth = estimate(settings.depth_model, source)
    return Pictures(init, mask, depth)


def open_picture(path: Path | None, flag: str) -> Any:
    """A picture from a file, upright; a mask or depth map as one channel with all its levels.

    Raises:
        Problem: it cannot be read.
    """
    from PIL import Image

    from finetune.data.picture import BROKEN, Unreadable, decode

    if path is None:
        return None
    try:
        picture, _ = decode(path, MOST_PIXELS)
        if flag == "--depth":  # eight bits would flatten a map of sixteen
            with Image.open(path) as raw:
                picture = raw.convert("F") if raw.mode in ("I", "F", "I;16", "I;16B", "I;16L") else picture.convert("L")
    except (Unreadable, *BROKEN) as error:
        why = "There is no such file." if not path.exists() else f"{str(error).rstrip('.')}."
        raise Problem(f"{flag} {path} cannot be read.", why, "Give a PNG, JPEG or WebP.") from None
    return picture


def check(settings: Settings, axes: tuple[Axis | None, ...], pictures: Pictures) -> Any:
    """Refuse what cannot work, before any weights are loaded; returns where the model lies.

    Raises:
        Problem: the first thing that does not fit.
    """
    from finetune.model import schedulers
    from finetune.model.canvas import check as check_pictures
    from finetune.model.families import locate

    along = {one.name: one.values for one in axes if one}
    size(settings.size)
    if (last := max(along.get("seed", [settings.seed])) + settings.count - 1) >= 2**63:
        raise Problem(f"The seed {last} is too large.", "A generator takes 63 bits.", "Use a smaller --seed.")
    for sampler in along.get("sampler", [settings.sampler]):
        schedulers.check(sampler, 1, settings.spacing, settings.karras)
    location = locate(settings.model)
    given = settings.denoising_strength
    for strength in along.get("denoising-strength", [1.0 if given is None else given]):
        check_pictures(location.variant, settings.model, init=pictures.init is not None, mask=pictures.mask is not None,
                       depth=pictures.depth is not None, strength=strength)
    if pictures.mask is not None and pictures.mask.size != pictures.init.size:
        raise Problem(f"--mask is {pictures.mask.width}x{pictures.mask.height} pixels, --init-image {pictures.init.width}x{pictures.init.height}.",
                      "Which pixel belongs to which cannot be told.", "Make the mask as large as the picture.")
    return location


def notes(ready: Any, chosen: tuple[Any, ...], jobs: list[Job], said: set[Any], console: Console) -> None:
    """Prompts that are long, and artifacts whose word stands in none; each said once (`said` remembers)."""
    from finetune.model.prompts import chunk_length, count

    for text in dict.fromkeys(job.text for job in jobs if job.text not in said):
        said.add(text)
        tokens, parts = count(ready.base, text)
        if parts > 1:
            short = text if len(text) < 40 else text[:39] + "…"
            console.print(f"Note: the prompt “{short}” has {tokens} tokens; it is read in {parts} parts of {chunk_length(ready.base)}.",
                          style="yellow", soft_wrap=True)
    for one, loaded in zip(chosen, ready.loaded, strict=True):
        if loaded.trigger and one.path not in said and not any(loaded.trigger in job.text for job in jobs):
            said.add(one.path)
            console.print(f"Note: no prompt contains {loaded.trigger!r}, the phrase {one.path} was trained with.", style="yellow", soft_wrap=True)


def facts(settings: Settings, ready: Any, chosen: tuple[Any, ...], size: str) -> dict[str, Any]:
    """What all pictures of one set of artifacts say in common."""
    import torch

    from finetune.cli.named import hashes

    base = ready.base
    short = hashes(base.location.path) if base.location.kind == "single-file" else base.hash[:10]
    named = {key: {"path": str(path), "hash": artifacts.fingerprint(path)} if (path := getattr(settings, key)) else None for key in PATHS}
    return {"finetune": __version__, "model": settings.model, "model_hash": base.hash, "model_short": short, "precision": settings.precision,
            "device": str(base.device), "torch": torch.__version__, "negative": settings.negative, "size": size, "karras": settings.karras,
            "spacing": settings.spacing, "own_spacing": base.scheduler_config.get("timestep_spacing"),
            "clip_skip": settings.clip_skip, "batch": settings.batch,
            "artifacts": [artifacts.facts(one, loaded) for one, loaded in zip(chosen, ready.loaded, strict=True)], **named}


def facts_of_job(job: Job) -> dict[str, Any]:
    """What is one picture's own."""
    return {"prompt": job.prompt, "seed": job.seed, "steps": job.steps, "guidance": job.guidance, "sampler": job.sampler,
            "denoising_strength": job.strength}
