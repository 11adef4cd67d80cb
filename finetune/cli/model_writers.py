"""Whole models as single files and as diffusers folders, for `finetune export` and `finetune convert`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.cli.targets import DTYPES, Source, Written
from finetune.errors import Problem
from finetune.formats import ldm, ldm_ckpt, ldm_folder, stream
from finetune.formats.header import read_header
from finetune.formats.ldm import Checkpoint
from finetune.formats.ldm_shapes import shapes_of

SINGLE = (".safetensors", ".ckpt")


def model(source: Source, places: Mapping[str, Path], dtype: str | None, base: str | None = None, like: Path | None = None) -> Written:
    """Write a whole model.

    Args:
        places: layout ("single" or "folder") to path.
        dtype: "fp16", "fp32", "bf16", or None for the numbers as they are.
        base: SD 2's original checkpoint, for the text block diffusers does not keep.
        like: a folder that describes a single file.
    """
    done, kind = Written(), DTYPES[dtype] if dtype else None
    single = source.path.is_file()
    for layout, path in places.items():
        if layout == "single" and single:
            _repack(source.path, path, kind, done)
        elif single and source.path.suffix == ".ckpt":
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as folder:  # beside: a checkpoint may be larger than /tmp
                safe = Path(folder) / f"{source.path.stem}.safetensors"
                _repack(source.path, safe, kind, done)
                done.files.clear()
                _from_checkpoint(Source("model", safe, source.name, source.run, source.told), layout, path, None, base, like, done)
        else:
            _from_checkpoint(source, layout, path, kind, base, like, done)
    return done


def _repack(path: Path, target: Path, kind: str | None, done: Written) -> None:
    """A single file as a single file: what readers use, in the number format asked for."""
    flat = ldm_ckpt.read(path) if path.suffix == ".ckpt" else stream.of_file(path)
    stays, dropped = ldm_ckpt.kept(flat)
    done.notes += [f"Left out: {count:,} tensors of {part}, which no reader uses." for part, count in dropped.items()]
    metadata = {} if path.suffix == ".ckpt" else {key: value for key, value in read_header(path).metadata.items() if key not in ldm.HASHES}
    stream.save(target, {key: entry.to(kind or entry.dtype) for key, entry in stays.items()}, {"format": "pt", **metadata}, ldm.HASHES)
    done.files.append(target)
    if path.with_suffix(".yaml").is_file():
        done.notes.append(f"{path.with_suffix('.yaml').name} is not copied: a yaml can name any code. "
                          "`finetune convert ... --to diffusers` and back writes one of our own for v-prediction.")


def _from_checkpoint(source: Source, layout: str, path: Path, kind: str | None, base: str | None, like: Path | None, done: Written) -> None:
    metadata = {"finetune.base": source.name, **source.told, **_own(source.path)}
    with opened(source.path, like) as (checkpoint, folder):
        if layout == "folder":
            ldm_folder.write(path, checkpoint, folder, kind, metadata if len(metadata) > 1 else {})
            _set_prediction(path, checkpoint.prediction)
            done.files.append(path)
            if checkpoint.extra:
                done.notes.append("The last block of SD 2's text encoder, its text projection and logit scale are not in a folder: no reader uses them.")
            return
        if layout == "single":
            done.files += ldm.write(path, checkpoint, metadata, kind, _original(checkpoint, base or metadata["finetune.base"], done))


def _own(path: Path) -> dict[str, str]:
    """Our own metadata in a folder or a single file."""
    if path.is_dir():
        return runs.read_json(path / "finetune.json") if (path / "finetune.json").is_file() else {}
    if path.suffix == ".safetensors" and path.is_file():
        return {key: value for key, value in read_header(path).metadata.items() if key.startswith("finetune.")}
    return {}


def _set_prediction(folder: Path, prediction: str) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    config = runs.read_json(file)
    if config.get("prediction_type", "epsilon") != prediction:
        runs.write_json(file, {**config, "prediction_type": prediction})


def _original(checkpoint: Checkpoint, base: str, done: Written) -> Any:
    """SD 2's text encoder as the base checkpoint has it, for the block diffusers does not keep."""
    if ldm.layout_of(checkpoint) != "sd2":
        return None
    found = ldm.original_text(base)
    if found is None and not checkpoint.extra:
        done.notes.append("The last block of SD 2's text encoder is a copy of the one before; no reader uses it. "
                          "--base CHECKPOINT.safetensors takes the original's.")
    return found


@contextlib.contextmanager
def opened(path: Path, like: Path | None) -> Iterator[tuple[Checkpoint, Path]]:
    """A model in diffusers' names with its configurations, and a folder that describes it; weights are read as they are needed."""
    from finetune.model.families import locate

    if path.is_file():
        with _description(path, like) as (checkpoint, folder):
            yield checkpoint, folder
        return
    location = locate(str(path))
    if location.delta is None:
        yield ldm.of_folder(location.path), location.path
        return
    from finetune.model import load

    with tempfile.TemporaryDirectory() as folder:  # the networks are put together in memory: their weights lie in no file
        load(str(path)).pipeline().save_pretrained(folder, safe_serialization=True)
        yield ldm.of_folder(folder), Path(folder)


@contextlib.contextmanager
def _description(path: Path, like: Path | None) -> Iterator[tuple[Checkpoint, Path]]:
    """A single file's weights, and a folder with the configurations it does not hold: `like`, toybox's, or a published model's."""
    from finetune.model.configs import config_folder
    from finetune.model.families import TOYBOX, locate

    checkpoint = ldm.read(path)
    shapes = {part: {name: entry.shape for name, entry in state.items()} for part, state in checkpoint.parts.items()}
    with contextlib.ExitStack() as stack:
        folder = like
        if folder is None and shapes == shapes_of(_configs(TOYBOX, checkpoint)):
            folder = TOYBOX
        if folder is None:
            location = locate(str(path))
            if location.family not in ("sd1", "sd2", "sdxl"):
                raise Problem(f"{path} is of no known family.", "A single file does not say how many heads its attention has, nor its tokenizer.",
                              "Add --like FOLDER, a diffusers folder of the model it was made from.")
            folder = stack.enter_context(config_folder(path, location.family, location.variant))
        configs = _configs(folder, checkpoint)
        told = read_header(path).metadata.get("finetune.prediction_type")
        scheduler = runs.read_json(folder / "scheduler" / "scheduler_config.json")
        configs["scheduler"] = {**scheduler, **({"prediction_type": told} if told else {})}
        yield Checkpoint(checkpoint.parts, configs, checkpoint.extra), folder


def _configs(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The configurations of a folder for the parts a checkpoint has."""
    files = {part: folder / part / "config.json" for part in checkpoint.parts}
    return {part: runs.read_json(file) for part, file in files.items() if file.is_file()}
