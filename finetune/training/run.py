"""One run from settings to artifact: pictures, base, class pictures, training, export, manifest."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console

import finetune
from finetune import data, draws, engine, methods, runs
from finetune.errors import Problem
from finetune.methods.base import Method
from finetune.model.base import Base, load, pick_device
from finetune.model.families import CHANNELS, locate
from finetune.model.sampling import render
from finetune.model.text import encode_cached
from finetune.settings import TrainSettings
from finetune.training import artifacts, checkpoint, memory, stopping
from finetune.training.announce import announce
from finetune.training.artifacts import LIBRARIES
from finetune.training.loop import Progress, State, at_rest, fit, prepare, validation_loss
from finetune.training.meter import Meter


@dataclass(frozen=True)
class Ending:
    """How the steps ended: seconds inside them by the clock and of all cores, and why: all were taken, the loss has settled, or a signal came."""

    seconds: float
    cpu_seconds: float
    reason: Literal["steps", "dvar", "signal"]


def train(settings: TrainSettings, console: Console | None = None) -> Path:
    """Run a method from settings to artifact; returns the run's folder.

    Raises:
        Problem: anything the user can put right, before training wherever it can be known before.
    """
    console = console or Console()
    method = methods.get(settings.METHOD)(settings)
    method.check()
    artifacts.check_targets(settings, method)
    _check_variant(settings)
    folder = _open_folder(settings)
    started = time.perf_counter()
    device = pick_device(settings.device)
    _check_precision(settings, device)
    given, (settings, notes) = settings, memory.settled(settings, method, device)
    method.settings = settings
    intake = data.intake(settings)
    AcceleratorState._reset_state()  # a process may train several times, in several precisions
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(settings.precision, settings.precision), cpu=device.type == "cpu")
    if accelerator.num_processes > 1:
        raise Problem(f"This run was started as {accelerator.num_processes} processes.", "Training writes its folder from one process.",
                      "Start it without torchrun or accelerate launch.")
    base = load(settings.model, accelerator.device, unet_dtype=None if method.replaces else engine.weights_dtype(settings),
                unet_later=settings.free_encoders)
    manifest = _manifest(settings, method, base, intake)
    runs.write_json(folder / "settings.json", given.model_dump(mode="json") | {"method": method.name, "rung": settings.memory})
    runs.write_json(folder / "manifest.json", manifest)
    classes, class_seconds = _class_pictures(settings, method, base, console)
    captions = data.caption_candidates(intake.pictures, method.templates(), method.subject)
    source = data.source(settings, intake, classes, base.vae, captions, method.class_prompt if classes else "", base.device,
                         data.cache_folder(_cache() / "latents", settings, base.hash))
    _encode_pictures(settings, base, source, accelerator, console)
    base.recall("unet")
    state = prepare(base, method, settings, accelerator)
    state.notes[:0] = notes
    if settings.resume:
        checkpoint.restore(folder, state, settings.model_dump(mode="json"))
        runs.trim_metrics(folder, state.step)
        artifacts.drop_later(folder, state)
    announce(console, settings, method, base, intake, classes, source, state)
    _encode_prompts(settings, method, base, source)
    if settings.keep_pages and method.replaces and device.type == "cpu":  # gradients as large as the model; elsewhere it costs more than it saves
        engine.keep_pages()
    with _finish_on_failure(folder, manifest):
        ending = _steps(folder, settings, method, base, source, accelerator, state, console)
        if ending.reason == "signal":
            _note_stop(folder, manifest, state, console)
            return folder
        artifacts.export(folder, settings, method, base, len(intake.pictures), state.step)
    seconds = {"total": time.perf_counter() - started, "training": ending.seconds, "class_images": class_seconds,
               "per_step": ending.seconds / state.step, "training_cpu": ending.cpu_seconds}
    manifest |= _length(settings, state.step)
    if ending.reason == "dvar":
        manifest["stopped"] = {"reason": "dvar", "step": state.step, "planned": settings.steps}
        console.print(f"The loss on the fixed set has settled: ended after step {state.step} of {settings.steps}.")
    _close(folder, manifest, state, seconds, console)
    for line in memory.beside_the_plan(settings, base, manifest):
        console.print(line, soft_wrap=True)
    return folder


def _open_folder(settings: TrainSettings) -> Path:
    """The run's folder, empty or to be resumed.

    Raises:
        Problem: a run is in it already.
    """
    folder = Path(settings.output) if settings.output else runs.free_run_folder(settings.METHOD)
    settings.output = folder
    taken = (folder / "manifest.json").is_file()
    if taken and settings.overwrite:
        for name in ("artifact", "checkpoints", "previews", "steps"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("manifest.json", "metrics.jsonl", "settings.json", "curve.json"):
            (folder / name).unlink(missing_ok=True)
    elif taken and not settings.resume:
        raise Problem(f"There is a run in {folder} already.", "It would be mixed up with the new one.",
                      "Choose another --output, go on with --resume, or clear it with --overwrite.")
    elif not taken and settings.resume:
        raise Problem(f"There is no run in {folder} to resume.", "", "Name its folder with --output, or start without --resume.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_variant(settings: TrainSettings) -> None:
    """Inpainting and depth models draw here; they do not learn: their training would need masks or depth maps."""
    variant = locate(settings.model).variant
    if variant != "plain":
        raise Problem(f"The model {settings.model!r} takes {CHANNELS[variant]} latent channels, not 4.",
                      "It is an inpainting or depth model, whose training needs masks or depth maps.", "Train on its plain text-to-image base.")


def _check_precision(settings: TrainSettings, device: torch.device) -> None:
    if settings.precision == "fp16" and device.type == "cpu":
        raise Problem("--precision fp16 needs a GPU.", "CPUs have no fast half-precision arithmetic and no loss scaling here.",
                      "Use --precision fp32 or bf16.")


def _class_pictures(settings: TrainSettings, method: Method, base: Base, console: Console) -> tuple[list[Any], float]:
    """Class pictures for prior preservation, the user's or rendered by the untouched base; and the seconds they took."""
    if settings.prior != "images":
        return [], 0.0
    if settings.class_dir:
        found = data.scan(settings.class_dir, settings.max_pixels, flag="--class-dir", captions=False)
        for file, reason in found.skipped:
            console.print(f"class picture {file} is skipped: {reason}", soft_wrap=True)
        return found.pictures or data.own_class_images(settings.class_dir, settings.max_pixels), 0.0  # the latter refuses
    base.recall("unet")
    kept = "fp32" if method.replaces else engine.format_of(settings)
    if kept != "fp32":  # the base as it will be trained on, and pictures that are not taken for those of the whole one
        engine.store(base.unet, settings)
    started = time.perf_counter()
    sampler = {"steps": settings.class_steps, "guidance": settings.class_guidance, "size": settings.resolution, "sampler": "dpm++",
               **({} if kept == "fp32" else {"frozen": kept, "precision": settings.precision})}

    def draw(prompts: list[str], seeds: list[int]) -> list[Any]:
        with engine.autocast(settings, base.device) if kept != "fp32" else contextlib.nullcontext():
            return render(base, prompts, seeds, steps=settings.class_steps, guidance=settings.class_guidance, size=settings.resolution)

    with Meter(console, "class pictures", settings.class_images) as meter:
        pictures = data.class_images(_cache() / "class-images", method.class_prompt, settings.class_images, settings.seed, base.hash, sampler, draw,
                                     lambda done, count: meter.to(done))
    return pictures, time.perf_counter() - started


def _cache() -> Path:
    """Where class pictures and encoded pictures are kept between runs."""
    return Path(os.environ.get("FINETUNE_CACHE", "~/.cache/finetune")).expanduser()


def _encode_pictures(settings: TrainSettings, base: Base, source: Any, accelerator: Accelerator, console: Console) -> None:
    """Encode every picture once, before the UNet takes its room, and let the VAE go; random crops need it at each step."""
    with Meter(console, "pictures", 1) as meter:
        done = source.fill(settings.steps, accelerator.num_processes, lambda done, count: meter.to(done, total=count))
    if done and settings.free_encoders:
        base.free("vae")


def _encode_prompts(settings: TrainSettings, method: Method, base: Base, source: Any) -> None:
    """Encode every prompt once and let the text encoders go, unless they train or learn a word."""
    if not any(value.requires_grad for _, encoder, _ in base.encoders() for value in encoder.parameters()):
        encode_cached(base, [*source.captions(), *([method.class_prompt] if settings.prior == "distill" else [])])
        if settings.free_encoders:
            base.free(*(name for name, _, _ in base.encoders()))


def _steps(folder: Path, settings: TrainSettings, method: Method, base: Base, source: Any, accelerator: Accelerator, state: State,
           console: Console) -> Ending:
    """All steps, or fewer when the loss has settled, with logging, validation, previews, artifacts and checkpoints."""
    metrics = runs.read_metrics(folder)
    last_line = next((line for line in reversed(metrics) if "seconds" in line), {})
    spent, busy = last_line.get("seconds", 0.0), last_line.get("cpu_seconds", 0.0)
    watched = stopping.looked_at(metrics, settings.validate_every) if settings.validate_every else []
    if state.step == 0 and settings.validate_every:
        watched.append(_validate(folder, settings, method, base, source, 0))
    if _settled(settings, watched):  # a run that had settled is resumed: its checkpoint is where it ends
        return Ending(spent, busy, "dvar")
    values, losses = settings.model_dump(mode="json"), []
    with _interrupts() as interrupted, Meter(console, method.name, settings.steps, state.step) as meter:
        for progress in fit(base, method, source, settings, accelerator, state):
            spent, busy = spent + progress.seconds, busy + progress.cpu_seconds
            losses.append(progress.loss)
            last = state.step == settings.steps
            if _due(settings.validate_every, state.step, last):
                loss = _validate(folder, settings, method, base, source, state.step)
                watched += [loss] if state.step % settings.validate_every == 0 else []
            done = _settled(settings, watched) and not last
            last = last or done
            signalled = interrupted() and not last
            artifact = _due(settings.export_every, state.step, last)
            keep = signalled or done or _due(settings.checkpoint_every, state.step)
            if state.step % settings.log_every == 0 or last or keep or artifact:
                _log(folder, progress, losses, spent, busy)
                meter.to(state.step, loss=float(torch.stack(losses).mean()))
                losses.clear()
            if _due(settings.preview_every, state.step, last):
                _preview(folder, settings, method, base, state.step)
            if artifact:  # before the checkpoint: what a checkpoint leaves behind is there
                artifacts.export(artifacts.along_the_way(folder, state.step), settings, method, base, len(source.pictures["instance"]), state.step)
            if keep:
                checkpoint.save(folder, state, values, settings.keep_checkpoints)
            if done or signalled:
                return Ending(spent, busy, "dvar" if done else "signal")
    return Ending(spent, busy, "steps")


def _due(every: int, step: int, last: bool = False) -> bool:
    """Whether something that happens every so many steps (0: never) and at the end happens now."""
    return every > 0 and (step % every == 0 or last)


def _settled(settings: TrainSettings, watched: list[float]) -> bool:
    """Whether --stop dvar ends the run, given the fixed set's losses so far."""
    return settings.stop == "dvar" and stopping.settled(watched, settings.stop_window, settings.stop_threshold)


def _validate(folder: Path, settings: TrainSettings, method: Method, base: Base, source: Any, step: int) -> float:
    """The loss on the fixed set, noted in metrics.jsonl."""
    loss = validation_loss(base, method, source, settings)
    runs.append_metrics(folder, step=step, validation_loss=loss)
    return loss


def _log(folder: Path, progress: Progress, losses: list[torch.Tensor], spent: float, busy: float) -> None:
    """One line of metrics: the mean loss since the last line, and the sums so far."""
    norm = None if not progress.grad_norm else float(progress.grad_norm)  # stepping in the backward pass has none
    runs.append_metrics(folder, step=progress.step, loss=float(torch.stack(losses).mean()), learning_rate=progress.learning_rate,
                        grad_norm=norm, seconds=round(spent, 4), cpu_seconds=round(busy, 4))


def _preview(folder: Path, settings: TrainSettings, method: Method, base: Base, step: int) -> None:
    """Pictures of the preview prompts, from draws of their own, so that training is not disturbed."""
    prompts = settings.preview_prompt or [data.fill(method.templates()[0], method.subject)]
    seeds = [draws.key(settings.seed, "preview", number) for number in range(len(prompts))]
    small = base.family == "toybox"
    state = torch.get_rng_state()
    with method.exported(), at_rest(base, method), base.recalled(), engine.autocast(settings, base.device):
        pictures = render(base, prompts, seeds, steps=25, guidance=4.0 if small else 7.5, size=settings.resolution)
    torch.set_rng_state(state)
    for number, picture in enumerate(pictures):
        with runs.atomic_path(folder / "previews" / f"{step:07d}-{number}.png") as temporary:
            picture.save(temporary)


def _manifest(settings: TrainSettings, method: Method, base: Base, intake: Any) -> dict[str, Any]:
    """What is known before the first step."""
    return {
        "finetune": finetune.__version__, "method": method.name, "title": method.title, "paper": method.paper, "row": Path(settings.output).name, "status": "running",
        "model": {"name": base.name, "family": base.family, "hash": base.hash, "prediction": base.prediction},
        "subject": method.subject, "class_noun": method.noun, "instance_prompt": data.fill(method.templates()[0], method.subject),
        **_length(settings, settings.steps), "batch_size": settings.batch_size,
        "pictures": [{"file": picture.file, "sha256": picture.sha256, "note": picture.note} for picture in intake.pictures],
        "skipped": [{"file": str(file), "reason": reason} for file, reason in intake.skipped],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": str(base.device), "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(["finetune", *sys.argv[1:]]),
    }


def _length(settings: TrainSettings, steps: int) -> dict[str, int]:
    """Steps and the pictures seen in them, as the manifest has them."""
    return {"steps": steps, "pictures_seen": steps * settings.batch_size * settings.accumulate}


def _close(folder: Path, manifest: dict[str, Any], state: State, seconds: dict[str, float], console: Console) -> None:
    """The manifest with what the run cost and left."""
    made = runs.read_json(folder / "artifact" / "artifact.json")
    size = sum(entry["bytes"] for entry in made["files"])
    memory = torch.cuda.max_memory_allocated() if manifest["device"].startswith("cuda") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    manifest |= {"status": "finished", "trainable_parameters": sum(value.numel() for value in state.parameters.values()),
                 "seconds": {key: round(value, 4) for key, value in seconds.items()}, "peak_memory_bytes": memory,
                 "artifact": {"bytes": size, "files": made["files"], "trigger": made["trigger"]},
                 "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    runs.write_json(folder / "manifest.json", manifest)
    console.print(f"[bold]{folder / 'artifact'}[/bold]  {size:,} bytes, {seconds['training']:.0f} s of training, "
                  f"peak memory {memory / 2**20:,.0f} MiB")


@contextlib.contextmanager
def _finish_on_failure(folder: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """A run that fails says so in its manifest."""
    try:
        yield
    except BaseException as error:
        runs.write_json(folder / "manifest.json", manifest | {"status": "failed", "reason": str(error) or type(error).__name__})
        raise


def _note_stop(folder: Path, manifest: dict[str, Any], state: State, console: Console) -> None:
    runs.write_json(folder / "manifest.json", manifest | {"status": "interrupted", "step": state.step})
    console.print(f"Stopped after step {state.step}; a checkpoint is in {folder}. Go on with the same command and "
                  f"[bold]--output {folder} --resume[/bold].", soft_wrap=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[Any]:
    """SIGINT and SIGTERM end the run after the current step; a second one ends at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours to take
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
