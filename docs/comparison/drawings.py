"""The plots and sheets of pictures of docs/comparison.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import font_manager  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

if TYPE_CHECKING:
    from write import Results

INK, BLUE, RULE = "#2b2a28", "#0072B2", "#dedad2"
LINES = {"dreambooth": (BLUE, "o"), "textual-inversion": ("#009E73", "^"), "lora": ("#D55E00", "s")}  # Okabe and Ito's colours
LEFT, GAP = 108, 4
FEW = ("coral-mug", "khaki-teapot", "teal-backpack", "turquoise-duck")  # whose pictures the smaller questions show: one of each pattern


def dots(results: Results, study: str, keys: list[str], target: Path) -> None:
    """One panel a score: each row's mean and interval, and a faint point for each cell."""
    rows = [row for row in results.studies[study]["rows"] if row["row"] not in ("real", "oracle")]
    keys = [key for key in keys if any(key in row["scores"] for row in rows)]
    figure = Figure(figsize=(2.7 * len(keys) + 1.8, 0.42 * len(rows) + 1.0), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for place, row in enumerate(rows):
            found = row["scores"].get(key)
            if not found:
                continue
            points = [cell[key] for cell in row.get("cells", {}).values() if cell.get(key) is not None]
            panel.plot(points, [place] * len(points), "o", color=BLUE, alpha=0.18, markersize=3.5, markeredgewidth=0)
            if found["low"] is not None:
                panel.plot([found["low"], found["high"]], [place, place], color=INK, linewidth=1.6)
            panel.plot(found["mean"], place, "D", color=INK, markersize=5)
        panel.set_title(results.heading(study, key), fontsize=10)
        panel.grid(axis="x", color=RULE, linewidth=0.6)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    panels[0].invert_yaxis()
    figure.savefig(target, dpi=110)


@dataclass(frozen=True)
class Dose:
    """A question of how much: for each line, its amounts and the (study, row) of each; and the score that pays."""

    title: str
    lines: dict[str, list[tuple[int, str, str]]]
    price: str


def doses() -> list[Dose]:
    """Rank, vectors and pictures."""
    return [
        Dose("LoRA: rank", {"lora": [(rank, "rank", f"rank-{rank}") for rank in (1, 4, 16, 64)]}, "other_drift"),
        Dose("Textual Inversion: vectors", {"textual-inversion": [(count, "vectors", f"vectors-{count}") for count in (1, 2, 4, 8)]}, "clip_t"),
        Dose("pictures", {row: [(count, f"pictures-{count}", row) for count in (1, 3, 5, 10)] for row in LINES}, "clip_t")]


def amounts(results: Results, target: Path) -> None:
    """Likeness above and its price below, by rank, vectors and pictures; faint lines are the single subjects."""
    asked = [dose for dose in doses() if all(results.has(study) for line in dose.lines.values() for _, study, _ in line)]
    if not asked:
        return
    figure = Figure(figsize=(3.4 * len(asked) + 0.6, 4.8), layout="constrained")
    panels = figure.subplots(2, len(asked), squeeze=False)
    for panel in panels[0, 1:]:
        panel.sharey(panels[0, 0])
    for across, dose in enumerate(asked):
        for panel, key in zip(panels[:, across], ("oracle", dose.price), strict=True):
            for number, (name, line) in enumerate(dose.lines.items()):
                curve(panel, results, line, key, *LINES[name], shift=1 + 0.06 * (number - (len(dose.lines) - 1) / 2), name=name if len(dose.lines) > 1 else None)
            first = next(iter(dose.lines.values()))
            panel.set_xscale("log", base=2)
            panel.set_xticks([amount for amount, _, _ in first], [str(amount) for amount, _, _ in first])
            panel.minorticks_off()
            panel.set_ylabel(results.heading(first[0][1], key), fontsize=9)
            panel.grid(axis="y", color=RULE, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0, across].set_title(dose.title, fontsize=10)
        if len(dose.lines) > 1:
            panels[1, across].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(target, dpi=110)


def curve(panel: Any, results: Results, line: list[tuple[int, str, str]], key: str, colour: str, mark: str, shift: float, name: str | None) -> None:
    """One line of a plot with its intervals: one of several, named in the legend, or alone, with its subjects."""
    rows = [(amount * shift, results.row(study, row)) for amount, study, row in line]
    rows = [(amount, row) for amount, row in rows if row["scores"].get(key)]
    scores = [row["scores"][key] for _, row in rows]
    places, means = [amount for amount, _ in rows], [one["mean"] for one in scores]
    panel.plot(places, means, color=colour, marker=mark, markersize=5, linewidth=1.8, label=name and results.title(line[0][1], name))
    panel.vlines(places, [one["low"] if one["low"] is not None else one["mean"] for one in scores],
                 [one["high"] if one["high"] is not None else one["mean"] for one in scores], color=colour, linewidth=1.1)
    if name is None:
        cells = sorted(set.intersection(*(set(row.get("cells", {})) for _, row in rows)))
        for cell in cells:
            panel.plot(places, [row["cells"][cell].get(key) for _, row in rows], color=colour, linewidth=0.8, alpha=0.3)


@dataclass(frozen=True)
class Group:
    """Columns of a sheet that show one prompt: the title above them, the picture's file, and a label, study and row for each."""

    title: str
    file: str
    columns: list[tuple[str, str, str]]


def home(work: Path, study: str, subject: str) -> Path | None:
    """The folder of a study's first cell of a subject; None where there is none."""
    info = json.loads((work / study / "comparison.json").read_text(encoding="utf-8"))
    for cell in info["cells"]:
        if cell["subject"] == subject:
            return Path(cell["folder"]) if Path(cell["folder"]).is_absolute() else work / study / cell["folder"]
    return None


def subjects_of(work: Path, study: str, only: tuple[str, ...]) -> list[str]:
    """The subjects of a study in order of their names; those named, where some are."""
    found = {cell["subject"] for cell in json.loads((work / study / "comparison.json").read_text(encoding="utf-8"))["cells"]}
    return sorted(found & set(only) or found)


def sheet(work: Path, target: Path, groups: list[Group], only: tuple[str, ...] = (), side: int = 96) -> None:
    """One line a subject, or for each of those named: a training picture, then the groups; every column of a group has the same prompt and noise."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)
    first = groups[0].columns[0][1]
    subjects = subjects_of(work, first, only)
    titled, step = any(group.title for group in groups), side + GAP
    top = 36 + (18 if titled else 0)
    width = LEFT + step * (1 + sum(len(group.columns) for group in groups)) + 3 * GAP * len(groups)
    canvas = Image.new("RGB", (width, top + len(subjects) * step), "white")
    pen, across = ImageDraw.Draw(canvas), LEFT
    pen.multiline_text((across + 2, top - 32), "a training\npicture", fill="black", font=font)
    for down, subject in enumerate(subjects):
        pen.text((6, top + down * step + side // 2 - 6), subject.replace("-", " "), fill="black", font=font)
        own = json.loads(((home(work, first, subject) or work) / "comparison.json").read_text(encoding="utf-8"))
        paste(canvas, Path(own["instance_files"][0]), across, top + down * step, side)
    across += step
    for group in groups:
        across += 3 * GAP
        pen.text((across + 2, 3), group.title, fill="black", font=font)
        for label, study, row in group.columns:
            pen.multiline_text((across + 2, top - 32), label, fill="black", font=font)
            for down, subject in enumerate(subjects):
                cell = home(work, study, subject)
                paste(canvas, cell / row / "images" / f"{group.file}.png" if cell else None, across, top + down * step, side)
            across += step
    canvas.save(target, quality=92, method=6)


def paste(canvas: Image.Image, file: Path | None, across: int, down: int, side: int) -> None:
    """A picture in its place; an empty square where there is none."""
    if file is None or not file.is_file():
        return
    with Image.open(file) as picture:
        canvas.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (across, down))


def sheets(work: Path, studies: list[str], images: Path) -> None:
    """Every sheet whose studies are there."""
    methods = [("DreamBooth", "dreambooth"), ("Textual\nInversion", "textual-inversion"), ("LoRA", "lora"), ("Hypernetwork\n(key, value)", "hypernetwork-key-value")]
    four = [("untouched\nbase", "base"), *methods]
    prior = [("untouched\nbase", "base"), ("DreamBooth\nwith prior", "dreambooth"), ("DreamBooth\nwithout", "dreambooth-no-prior"),
             ("LoRA\nwith prior", "lora-prior"), ("LoRA\nwithout", "lora")]
    counts = (1, 3, 5, 10)
    found = {
        "subjects": [Group("", "subject-01-0", [(label, "main", row) for label, row in four])],
        "prior": [Group(title, file, [(label, "prior", row) for label, row in prior])
                  for title, file in (("asked for the subject", "subject-01-0"), ("asked for any of its class", "class-00-0"))],
        "style": [Group(title, file, [(label, "style", row) for label, row in four])
                  for title, file in (("asked for the style", "subject-01-0"), ("not asked for it", "other-03-0"))],
        "rank": [Group("LoRA", "subject-01-0", [(f"rank {rank}", "rank", f"rank-{rank}") for rank in (1, 4, 16, 64)]),
                 Group("Textual Inversion", "subject-01-0", [(f"{count} vector{'s' * (count > 1)}", "vectors", f"vectors-{count}") for count in (1, 2, 4, 8)])],
        "pictures": [Group(label.replace("\n", " "), "subject-01-0", [(f"{count} picture{'s' * (count > 1)}", f"pictures-{count}", row) for count in counts])
                     for label, row in methods[:3]],
        "wiring": [Group(title, "subject-01-0", [(label, "wiring", f"{wires}-{scope}") for label, wires in
                                                 (("key, value", "kv"), ("key, query", "kq"), ("all three", "qkv"))])
                   for title, scope in (("cross-attention", "cross"), ("all attention", "all"))]}
    for name, groups in found.items():
        if all(study in studies for group in groups for _, study, _ in group.columns):
            only = () if name in ("subjects", "style") else FEW
            sheet(work, images / f"comparison-{name}.webp", groups, only, side=72 if sum(len(group.columns) for group in groups) > 10 else 96)
