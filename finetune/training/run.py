"""One run from settings to artifact: pictures, base, class pictures, training, export, manifest."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console

from finetune import data, draws, engine, methods, runs
from finetune.errors import Problem
from finetune.methods.base import Method
from finetune.model.base import Base, load, pick_device
from finetune.model.families import CHANNELS, locate
from finetune.model.sampling import render
from finetune.model.text import encode_cached
from finetune.model.words import check_prompts
from finetune.settings import TrainSettings
from finetune.training import artifacts, checkpoint, folders, memory, processes, records, signals, space, stopping
from finetune.training.announce import announce
from finetune.training.journal import Journal
from finetune.training.loop import State, at_rest, fit, prepare, validation_loss
from finetune.training.meter import Meter


@dataclass(frozen=True)
class Ending:
    """How the steps ended: what was noted of them, and why: all were taken, the loss has settled, or a signal came."""

    journal: Journal
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
    started = time.perf_counter()
    device = pick_device(settings.device)
    _check_precision(settings, device)
    accelerator = processes.start(settings, device)
    console = processes.console_of(accelerator, console)
    with contextlib.ExitStack() as held, signals.watched() as asked:
        settings.output, settings.resume = processes.shared(accelerator, lambda: folders.opened(settings, held, console))
        return _run(settings, method, accelerator, device, asked, console, started)


def _run(given: TrainSettings, method: Method, accelerator: Accelerator, device: torch.device, asked: signals.Asked, console: Console, started: float) -> Path:
    """The run in its folder, which is ours until it ends."""
    folder, writes = given.output, accelerator.is_main_process
    settings, notes = processes.shared(accelerator, lambda: memory.settled(given, method, device))
    method.settings = settings
    pages = engine.freed_memory(settings, method.replaces) if device.type == "cpu" else "library"
    if pages == "return":
        engine.set_pages(pages)
    intake = data.intake(settings)
    base = load(settings.model, accelerator.device, unet_dtype=None if method.replaces else engine.weights_dtype(settings),
                unet_later=settings.free_encoders)
    manifest = records.opening(settings, method, base, intake, accelerator)
    facts = records.facts(settings, method, base, intake, accelerator)
    if settings.resume:
        manifest |= records.resumed_with(checkpoint.check(folder, facts, settings.resume_anyway), console)
    if writes:
        runs.write_json(folder / "settings.json", runs.hide_in(given.model_dump(mode="json")) | {"method": method.name, "rung": settings.memory})
        runs.write_json(folder / "manifest.json", manifest)
    with records.finish_on_failure(folder, manifest, writes):
        with accelerator.main_process_first():  # the others find them in the cache
            check_prompts(base, {"--class-prompt": settings.class_prompt})
            classes, class_seconds = _class_pictures(settings, method, base, console)
        captions = data.caption_candidates(intake.pictures, method.templates(), method.subject)
        source = data.source(settings, intake, classes, base.vae, captions, method.class_prompt if classes else "", base.device,
                             data.cache_folder(_cache() / "latents", settings, base.hash))
        _encode_pictures(settings, base, source, accelerator, console)
        base.recall("unet")
        state = prepare(base, method, settings, accelerator)
        given_prompt = data.fill(settings.instance_prompt, method.subject) if settings.instance_prompt else None
        for flag, prompt in [("--instance-prompt", given_prompt), *(("--preview-prompt", prompt) for prompt in settings.preview_prompt)]:
            check_prompts(base, {flag: prompt})
        state.notes[:0] = notes
        if settings.resume:
            checkpoint.restore(folder, state)
            if writes:
                runs.trim_metrics(folder, state.step)
                artifacts.drop_later(folder, state)
            accelerator.wait_for_everyone()
        announce(console, settings, method, base, intake, classes, source, state, accelerator.num_processes)
        if writes:
            space.check(folder, settings, method, base, state, len(intake.pictures))
        _encode_prompts(settings, method, base, source)
        if pages == "keep":  # not before: what loading leaves would stay as well
            engine.set_pages(pages)
        ending = _steps(folder, settings, method, base, source, accelerator, state, console, facts, asked)
        if writes:
            artifacts.export(folder, settings, method, base, len(intake.pictures), state.step)
    if ending.reason == "signal":
        if writes:
            records.note_stop(folder, manifest, state, console)
        return folder
    seconds = {"total": time.perf_counter() - started, "training": ending.journal.seconds, "class_images": class_seconds,
               "per_step": ending.journal.seconds / state.step, "training_cpu": ending.journal.cpu_seconds}
    manifest |= records.length(settings, state.step, accelerator)
    if ending.reason == "dvar":
        manifest["stopped"] = {"reason": "dvar", "step": state.step, "planned": settings.steps}
        console.print(f"The loss on the fixed set has settled: ended after step {state.step} of {settings.steps}.")
    manifest |= {"steps_left_out": ending.journal.skipped} if ending.journal.skipped else {}
    if not writes:
        return folder
    if not settings.keep_checkpoints:
        runs.remove_folder(folder / "checkpoints")
    records.close(folder, manifest, state, seconds, console)
    for line in memory.beside_the_plan(settings, base, manifest):
        console.print(line, soft_wrap=True)
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
           console: Console, facts: dict[str, Any], asked: signals.Asked) -> Ending:
    """All steps, or fewer when the loss has settled, with logging, validation, previews, artifacts and checkpoints.

    Args:
        facts: what a checkpoint's numbers follow from.
        asked: whether a signal came, which now waits for the end of a step.
    """
    writes = accelerator.is_main_process
    journal = Journal(folder, console, writes)
    watched = stopping.looked_at(journal.read, settings.validate_every) if settings.validate_every else []
    accelerator.wait_for_everyone()  # all have read before anyone writes
    if state.step == 0 and settings.validate_every:
        watched.append(validation_loss(base, method, source, settings))
        journal.look(0, watched[0], settings.learning_rate)
    if _settled(settings, watched):  # a run that had settled is resumed: its checkpoint is where it ends
        return Ending(journal, "dvar")
    asked.wait()
    with Meter(console, method.name, settings.steps, state.step) as meter:
        for progress in fit(base, method, source, settings, accelerator, state):
            journal.step(progress)
            last = state.step == settings.steps
            if _due(settings.validate_every, state.step, last):
                loss = validation_loss(base, method, source, settings)
                journal.look(state.step, loss, progress.learning_rate)
                watched += [loss] if state.step % settings.validate_every == 0 else []
            done = _settled(settings, watched) and not last
            last = last or done
            signalled = processes.anyone(accelerator, bool(asked)) and not last
            artifact = _due(settings.export_every, state.step, last)
            keep = signalled or done or _due(settings.checkpoint_every, state.step, last and _stays(settings, state.step))
            if state.step % settings.log_every == 0 or last or keep or artifact:
                meter.to(state.step, loss=journal.line(progress))
            if writes and _due(settings.preview_every, state.step, last):
                _preview(folder, settings, method, base, state.step)
            if writes and artifact:  # before the checkpoint: what a checkpoint leaves behind is there
                artifacts.export(artifacts.along_the_way(folder, state.step), settings, method, base, len(source.pictures["instance"]), state.step)
            if writes and keep:
                checkpoint.save(folder, state, facts, max(1, settings.keep_checkpoints))
            if done or signalled:
                return Ending(journal, "dvar" if done else "signal")
    return Ending(journal, "steps")


def _due(every: int, step: int, last: bool = False) -> bool:
    """Whether something that happens every so many steps (0: never) and at the end happens now."""
    return every > 0 and (step % every == 0 or last)


def _stays(settings: TrainSettings, step: int) -> bool:
    """Whether a checkpoint stays with a finished run, from which more steps can go on: where it takes the place of an earlier one."""
    return settings.keep_checkpoints > 0 and step > settings.checkpoint_every


def _settled(settings: TrainSettings, watched: list[float]) -> bool:
    """Whether --stop dvar ends the run, given the fixed set's losses so far."""
    return settings.stop == "dvar" and stopping.settled(watched, settings.stop_window, settings.stop_threshold)


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
