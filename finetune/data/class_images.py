"""Class images for prior preservation (Ruiz et al. 2023, sec. 3.2): rendered once by the untouched base, then kept.

The folder's name is a hash of everything the pictures depend on, and each picture has its own seed, so the cache is
valid by its name, an interrupted rendering goes on where it stopped, and asking for more renders only the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from finetune import draws, runs
from finetune.data.intake import scan
from finetune.data.picture import Picture, Unreadable, decode
from finetune.errors import Problem

Render = Callable[[list[str], list[int]], list[Image.Image]]

# Pictures asked for at once: what an interruption can lose.
PORTION = 8


def class_image_folder(cache: Path, prompt: str, seed: int, base_hash: str, sampler: Mapping[str, Any]) -> Path:
    """Where class images with these ingredients are kept."""
    recipe = json.dumps([base_hash, prompt, dict(sampler), seed], sort_keys=True, default=str)
    return Path(cache) / hashlib.sha256(recipe.encode()).hexdigest()[:16]


def class_images(folder_cache: Path, prompt: str, count: int, seed: int, base_hash: str, sampler: Mapping[str, Any],
                 render: Render, progress: Callable[[int, int], None] | None = None) -> list[Picture]:
    """`count` class pictures, rendering only those that are not there yet.

    Args:
        folder_cache: parent of all class image folders.
        prompt: class prompt, the same for all.
        seed: seed of the run; picture i is rendered with `draws.key(seed, "class-image", i)`.
        base_hash: content hash of the base model.
        sampler: everything else the pictures depend on (steps, guidance, size, scheduler).
        render: prompts and seeds to pictures, by the untouched base.
        progress: called with (pictures there, count).
    """
    folder = class_image_folder(folder_cache, prompt, seed, base_hash, sampler)
    paths = [folder / f"{i:05d}.png" for i in range(count)]
    found = {path: picture for path in paths if (picture := _read(path)) is not None}
    missing = [i for i in range(count) if paths[i] not in found]
    if missing:
        runs.write_json(folder / "class-images.json",
                        {"prompt": prompt, "seed": seed, "base_hash": base_hash, "sampler": dict(sampler)})
    for start in range(0, len(missing), PORTION):
        portion = missing[start:start + PORTION]
        images = render([prompt] * len(portion), [draws.key(seed, "class-image", i) for i in portion])
        for i, image in zip(portion, images, strict=True):
            with runs.atomic_path(paths[i]) as temporary:
                image.convert("RGB").save(temporary, format="PNG")
            found[paths[i]] = Picture(paths[i].name, paths[i], None, "", runs.sha256(paths[i]), image.size)
        if progress:
            progress(len(found), count)
    return [found[path] for path in paths]


def _read(path: Path) -> Picture | None:
    """A picture of the cache, or None when it is not there or damaged (then it is rendered again)."""
    if not path.is_file():
        return None
    try:
        image, _ = decode(path, 100_000_000)
    except Unreadable:
        return None
    return Picture(path.name, path, None, "", runs.sha256(path), image.size)


def own_class_images(folder: Path, max_pixels: int) -> list[Picture]:
    """The pictures of a folder the user gave as class pictures; unreadable ones are left out, see `scan` for why.

    Raises:
        Problem: no such folder, or no readable picture in it.
    """
    found = scan(Path(folder), max_pixels, flag="--class-dir", captions=False)
    if not found.pictures:
        raise Problem(f"--class-dir {folder} has no readable picture.",
                      "; ".join(f"{file}: {reason}" for file, reason in found.skipped[:3]) + "." if found.skipped else "It is empty.",
                      "Put JPEG or PNG pictures of the class there, or leave --class-dir out to have them rendered.")
    return found.pictures
