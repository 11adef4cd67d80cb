"""`finetune toybox`: pictures of the rendered world, the measured base, and its variants."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from finetune.cli.generate import bar
from finetune.errors import Problem, nearest
from finetune.settings import setting

Words = list[str]  # the setting `list` hides the type's own name inside the class
SHARED = {"seed": ("render", "variant"), "output": ("render", "evaluate", "variant"), "model": ("evaluate", "variant")}
ANY = "; may be repeated [default: any]"


class Settings(BaseModel):
    """What `finetune toybox` takes; a flag belongs to the action its group is named after, those of 'run' to several."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["render", "evaluate", "variant"] = setting(
        ..., "render pictures of the world; evaluate the base against its bars; train a variant of the base", group="arguments")
    kind: Literal["v-prediction", "inpainting", "depth"] | None = setting(
        None, "for variant: which; for evaluate: a shipped one (inpainting, depth) instead of the base", group="arguments")

    list: bool = setting(False, "print the world's words, its subjects and the held-out triples, and stop", group="render")
    count: int | None = setting(
        None, "pictures [default: 24; 5 of a subject; with --oracle 1 of each scene and style]", group="render", ge=1)
    noun: Words = setting([], "only this thing" + ANY, group="render")
    colour: Words = setting([], "only this colour" + ANY, group="render")
    pattern: Words = setting([], "only this pattern" + ANY, group="render")
    scene: Words = setting([], "only this place" + ANY, group="render")
    style: Words = setting([], "only this style" + ANY, group="render")
    held_out: bool = setting(False, "the triples of thing, colour and pattern that training never shows, and only these", group="render")
    subject: Words = setting([], "instead: photographs of a held-out subject, to personalize on; may be repeated, or 'all'", group="render")
    oracle: bool = setting(False, "of --subject: the truth in every scene and style, not its photographs", group="render")
    captions: Literal["full", "varied"] = setting("full", "full: captions name everything; varied: they leave words out", group="render")
    masks: bool = setting(False, "also write masks/: what the thing covers", group="render")
    depth: bool = setting(False, "also write depth/: near is bright, as disparity", group="render")
    sheet: Path | None = setting(None, "write a labelled contact sheet to this PNG; without --output only that", group="render")

    prompts: int | None = setting(
        None, "prompts to draw, and three tenths as many again with held-out triples [default: 500; of a variant 200 pictures of each task]",
        group="evaluate", ge=4)

    steps: int | None = setting(
        None, "optimizer steps [default: 600 of 16 pictures; for inpainting and depth 500 of 8]", unit="steps", group="variant", ge=1)
    learning_rate: float | None = setting(
        None, "peak learning rate; it rises for some steps and falls to zero [default: 3e-4; for inpainting and depth 7e-4]",
        group="variant", gt=0)
    pictures: int | None = setting(
        None, "for v-prediction: pictures of the world to train on [default: 6000]; the others never see one twice", group="variant", ge=512)
    start: Path | None = setting(None, "for inpainting and depth: a delta.safetensors to go on from; give another --seed", group="variant")
    rank: int | None = setting(None, "for inpainting and depth: rank of the LoRA [default: 16]", group="variant", ge=1)

    seed: int = setting(0, "of pictures and training; evaluate has its own, which do not change", group="run", ge=0)
    output: Path | None = setting(
        None, "folder to write [default: toybox-pictures, toybox-v or toybox-VARIANT; evaluate writes its model card there, if it is given]", group="run")
    model: str = setting("toybox", "the base to evaluate or to start from", group="run")


def run(settings: Settings, console: Console) -> None:
    """Do what the action says."""
    refuse_foreign_flags(settings)
    {"render": render, "evaluate": evaluate, "variant": variant}[settings.action](settings, console)


def refuse_foreign_flags(settings: Settings) -> None:
    """A flag that the action would pass over in silence is a mistake."""
    for key in sorted(settings.model_fields_set - {"action", "kind"}):
        group = Settings.model_fields[key].json_schema_extra["group"]
        actions = SHARED.get(key, (group,))
        if settings.action not in actions:
            raise Problem(f"--{key.replace('_', '-')} says nothing to `toybox {settings.action}`.", f"It belongs to `toybox {'` and `toybox '.join(actions)}`.",
                          "Leave it out.")
    if settings.action == "render" and settings.kind:
        raise Problem(f"{settings.kind} says nothing to `toybox render`.", "It is a variant of the base.", "Leave it out.")
    if settings.action == "evaluate" and settings.kind == "v-prediction":
        raise Problem("v-prediction says nothing to `toybox evaluate`.", "That variant is not shipped, and is measured like the base.",
                      "finetune toybox evaluate --model FOLDER")
    if settings.action == "evaluate" and settings.kind and "model" in settings.model_fields_set:
        raise Problem(f"--model says nothing to `toybox evaluate {settings.kind}`.", "The variants that are measured are those of the package.", "Leave it out.")
    if settings.action == "variant" and settings.kind is None:
        raise Problem("`toybox variant` needs to know which variant.", "There are v-prediction, inpainting and depth.",
                      "finetune toybox variant inpainting")
    for wrong in ("rank", "start") if settings.kind == "v-prediction" else ("pictures",):
        if settings.action != "variant" or getattr(settings, wrong) is None:
            continue
        raise Problem(f"--{wrong} says nothing to `toybox variant {settings.kind}`.", "The help says which variant it belongs to.", "Leave it out.")


# ---- render ---------------------------------------------------------------------------------------------------------


def render(settings: Settings, console: Console) -> None:
    """An image folder, a contact sheet, or both; or the list of what there is."""
    if settings.list:
        return show_list(console)
    from finetune import runs
    from finetune.toybox.imagefolder import write_folder
    from finetune.toybox.sheet import LARGEST, contact_sheet

    total, items = items_of(settings)
    if settings.sheet is not None:
        shown = list(islice(items, LARGEST))
        sheet = contact_sheet(shown, masks=settings.masks, depth=settings.depth)
        with runs.atomic_path(settings.sheet.with_suffix(".png")) as temporary:
            sheet.save(temporary)
        console.print(f"{len(shown)} of {total} pictures on {settings.sheet.with_suffix('.png')}", soft_wrap=True)
        items = chain(shown, items)
        if settings.output is None:
            return
    output = settings.output or Path("toybox-pictures")
    with bar(console, "rendering", total) as progress:
        written = write_folder(items, output, masks=settings.masks, depth=settings.depth, progress=progress)
    console.print(f"{written} pictures with metadata.jsonl in {output}", soft_wrap=True)


def items_of(settings: Settings) -> tuple[int, Iterator[Any]]:
    """How many pictures were asked for, and the pictures, not yet drawn."""
    from finetune.toybox import imagefolder
    from finetune.toybox.datasets import VALUES
    from finetune.toybox.subjects import SUBJECTS

    only = {kind: getattr(settings, kind) for kind in VALUES if getattr(settings, kind)}
    for kind, words in only.items():
        check(words, VALUES[kind], kind)
    if not settings.subject:
        if settings.oracle:
            raise Problem("--oracle needs --subject.", "The oracle is a held-out subject's true look.", "Add --subject lilac-cat.")
        count = settings.count or 24
        return count, imagefolder.world_items(count, settings.seed, only=only, held=settings.held_out, captions=settings.captions)
    names = list(SUBJECTS) if settings.subject == ["all"] else settings.subject
    check(names, SUBJECTS, "subject")
    taken = [key for key in ("noun", "colour", "pattern", "held_out", "captions") if key in settings.model_fields_set]
    taken += [] if settings.oracle else [key for key in ("scene", "style") if key in only]
    if taken:
        raise Problem(f"--{taken[0].replace('_', '-')} and --subject do not go together.",
                      "A subject has its own look." if taken[0] not in only or taken[0] in ("noun", "colour", "pattern")
                      else "Its photographs have their own places.", "Leave one out, or add --oracle to choose scene and style.")
    if not settings.oracle:
        count = settings.count or 5
        return count * len(names), chain.from_iterable(imagefolder.reference_items(SUBJECTS[name], count, settings.seed) for name in names)
    places = {"scenes": tuple(only.get("scene", VALUES["scene"])), "styles": tuple(only.get("style", VALUES["style"]))}
    count = settings.count or 1
    total = count * len(names) * len(list(product(*places.values())))
    return total, chain.from_iterable(imagefolder.oracle_items(SUBJECTS[name], count, settings.seed, **places) for name in names)


def check(words: list[str], known: Any, kind: str) -> None:
    """Refuse a word the world does not have."""
    for word in words:
        if word not in known:
            raise Problem(f"The world has no {kind} {word!r}.", nearest(word, known) or f"It has {', '.join(known)}.",
                          "`finetune toybox render --list` names them all.")


def show_list(console: Console) -> None:
    """What the world is made of, in a table of 80 columns."""
    from finetune.toybox.datasets import VALUES, held_out_triples
    from finetune.toybox.subjects import SUBJECTS

    wide = min(console.width, 80)
    table = Table(width=wide, title="The rendered world", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    titles = {"noun": "--noun", "colour": "--colour", "pattern": "--pattern", "scene": "--scene", "style": "--style"}
    for kind, values in VALUES.items():
        table.add_row(f"{titles[kind]} ({len(values)})", ", ".join(values))
    console.print(table)
    table = Table("--subject", "in words of the world", width=wide, title=f"{len(SUBJECTS)} held-out subjects", title_justify="left")
    for subject in SUBJECTS.values():
        table.add_row(subject.name, subject.words)
    console.print(table)
    triples = held_out_triples()
    table = Table("thing", "colour and pattern", width=wide, title=f"{len(triples)} held-out triples, never shown in training", title_justify="left")
    for noun in VALUES["noun"]:
        table.add_row(noun, ", ".join(f"{colour} {pattern}" for thing, colour, pattern in triples if thing == noun))
    console.print(table)


# ---- evaluate and variant -------------------------------------------------------------------------------------------


def evaluate(settings: Settings, console: Console) -> None:
    """Measure every bar, print the table, write the card where a folder was named."""
    from finetune.cli import quiet
    from finetune.toybox.card import write_card
    from finetune.toybox.evaluation import evaluate as measure

    quiet.libraries()
    if settings.kind:
        return evaluate_variant(settings, console)
    found = measure(settings.model, settings.prompts or 500, lambda sentence: console.print(sentence, markup=False, soft_wrap=True))
    console.print(bars_table(found, min(console.width, 80)))
    if settings.output is not None:
        for path in write_card(found, settings.output):
            console.print(f"Written: {path}", soft_wrap=True)


def bars_table(found: dict[str, Any], width: int = 80) -> Table:
    """bar | asked | measured | n | met, a line between the groups."""
    from finetune.toybox.card import shown

    table = Table("bar", width=width)
    for title in ("asked", "measured", "n", "met"):
        table.add_column(title, justify="right", no_wrap=True)
    for row, after in zip(found["rows"], [*found["rows"][1:], None], strict=True):
        met = "" if row["met"] is None else "yes" if row["met"] else "NO"
        table.add_row(row["title"], shown(row, "bar"), shown(row, "measured"), f"{row['n']:,}", met, style="bold red" if row["met"] is False else "",
                      end_section=after is not None and after["group"] != row["group"])
    return table


def evaluate_variant(settings: Settings, console: Console) -> None:
    """Measure a shipped variant against the plain base, print the table, write its page where a folder was named."""
    from finetune.toybox.variant_measure import measure, shown, write_page

    found = measure(settings.kind or "", settings.prompts or 200, lambda sentence: console.print(sentence, markup=False, soft_wrap=True))
    table = Table("", "variant", "plain base", "best possible", width=min(console.width, 100))
    for name, row in found["measured"].items():
        table.add_row(name, *(shown(row.get(who)) for who in ("variant", "plain base", "picture through the autoencoder")))
    console.print(table)
    if settings.output is not None:
        for path in write_page(settings.output, found):
            console.print(f"Written: {path}", soft_wrap=True)


def variant(settings: Settings, console: Console) -> None:
    """Fine-tune the UNet to another prediction, or to masks or depth, and write a whole base."""
    from finetune.cli import quiet

    quiet.libraries()
    flags = {"steps": settings.steps, "rate": settings.learning_rate, "pictures": settings.pictures, "rank": settings.rank,
             "start": settings.start}
    given = {name: value for name, value in flags.items() if value is not None}
    if settings.kind == "v-prediction":
        from finetune.toybox.variant import v_prediction

        output = settings.output or Path("toybox-v")
        v_prediction(settings.model, output, seed=settings.seed, console=console, **given)
    else:
        from finetune.toybox.variant_delta import widened

        output = settings.output or Path(f"toybox-{settings.kind}")
        widened(settings.model, str(settings.kind), output, seed=settings.seed, console=console, **given)
    console.print(f"Use it with --model {output}", soft_wrap=True)
