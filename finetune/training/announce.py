"""What the program really will do, printed before the first step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from finetune import data, engine
from finetune.methods.base import Method
from finetune.model.base import Base
from finetune.model.text import too_long
from finetune.settings import TrainSettings
from finetune.training import artifacts
from finetune.training.loop import State


def announce(console: Console, settings: TrainSettings, method: Method, base: Base, intake: Any, classes: list[Any], source: Any, state: State, world: int = 1) -> None:
    """Print pictures used and skipped, first prompts, trainable parameters, scale, rate, pictures seen, artifact bytes."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines(settings, method, base, intake, classes, source, state, world):
        table.add_row(label, text)
    console.print(table)
    for file in data.unnamed(intake.pictures, method.subject):
        console.print(f"[yellow]The caption of {file} does not contain “{method.subject}”: this picture will not teach that phrase.[/yellow]")
    for prompt in too_long(base, [caption for batch in source.validation() for caption in batch.captions]):
        console.print(f"[yellow]The end of this prompt is cut off, it is longer than {base.tokenizer.model_max_length} tokens:[/yellow] {prompt}")


def lines(settings: TrainSettings, method: Method, base: Base, intake: Any, classes: list[Any], source: Any, state: State, world: int = 1) -> list[tuple[str, str]]:
    """Label and text of each announced fact. `world`: processes that train together."""
    trained = sum(value.numel() for value in state.parameters.values())
    whole = sum(value.numel() for part in base.modules().values() for value in part.parameters())
    of_step = settings.batch_size * settings.accumulate * world
    seen = settings.steps * of_step
    found = [("method", f"{method.title} ({method.paper})"),
             ("base", f"{base.name}, {base.family}, {base.prediction}, {base.resolution} px, hash {base.hash}")]
    found += [("pictures" if number == 0 else "", line) for number, line in enumerate(data.describe_intake(intake))]
    if classes:
        found.append(("class pictures", f"{len(classes)} of “{method.class_prompt}”, weight {settings.prior_weight:g}"))
    elif settings.prior == "distill":
        found.append(("prior", f"towards the base's own word on “{method.class_prompt}”, weight {settings.prior_weight:g}"))
    first = [source.rows.row("instance", number).caption for number in range(3)]
    found += [("first prompts" if number == 0 else "", f"“{caption}”") for number, caption in enumerate(first)]
    found.append(("trained", f"{trained:,} of {whole:,} numbers ({trained / whole:.3%})"))
    found += method.facts()
    found.append(("learning rate", f"{settings.learning_rate:g}, {settings.schedule}, warm-up {settings.warmup} steps, {settings.optimizer}"))
    kept = engine.format_of(settings)
    found.append(("memory", f"rung {settings.memory}" + (f", frozen weights in {kept}" if kept != "fp32" and not method.replaces else "")))
    found += [("", note) for note in state.notes]
    found += [("", f"{world} processes with a share of every step each")] if world > 1 else []
    each = seen / max(1, len(intake.pictures))
    found.append(("will see", f"{seen:,} pictures in {settings.steps:,} steps of {of_step}: each picture {each:.3g} times"))
    found.append(("artifact", f"{method.expected_bytes(base):,} bytes of weights to {settings.output}/artifact"))
    metadata = artifacts.describe(settings, method, base, len(intake.pictures), settings.steps)
    for file, size in method.added_files(base, metadata).items():
        found.append(("", f"{size:,} bytes of them are {file}, its header counted"))
    if settings.export_every:
        number = artifacts.count(settings)
        size = number * method.expected_bytes(base)
        found.append(("along the way", f"{number} artifacts, one every {settings.export_every} steps: {size:,} bytes to {settings.output}/steps"))
    if settings.stop == "dvar":
        rule = f"the newest {settings.stop_window} losses on the fixed set vary less than {settings.stop_threshold:g} times as much as all"
        found.append(("may end early", f"when {rule}; there is one every {settings.validate_every} steps"))
    if state.step:
        found.append(("resumed", f"after step {state.step}"))
    return found
