"""Which pictures `finetune generate` renders: prompts, seeds and two axes, crossed; and how they lie on sheets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.cli.generate_artifacts import Artifact, parse
from finetune.errors import Problem, nearest
from finetune.model.schedulers import SAMPLERS

# axis -> how a value is read, the flag it takes the place of, how it is labelled
AXES: dict[str, tuple[Any, str, str]] = {
    "seed": (int, "seed", "seed {}"), "steps": (int, "steps", "{} steps"), "guidance": (float, "guidance", "guidance {:g}"),
    "sampler": (str, "sampler", "{}"), "strength": (float, "strength", "strength {:g}"),
    "denoising-strength": (float, "denoising_strength", "denoising {:g}"), "artifact": (str, "", "{}"), "prompt": (str, "prompt", "{}"),
}
LIMITS = {"seed": (0, 2**63 - 1), "steps": (1, 10_000), "guidance": (0, 1000), "denoising-strength": (0, 1), "strength": (-100, 100)}
NOTHING = "none"  # value of the artifact axis: without one


@dataclass(frozen=True)
class Axis:
    """What differs along one side of a sheet."""

    name: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        number: of its prompt, from 1. prompt: as written; text: without tags.
        strength: denoising strength. marks: what the file's name says of the axes.
        place: (sheet, row, column).
    """

    number: int
    prompt: str
    text: str
    artifacts: tuple[Artifact, ...]
    seed: int
    steps: int
    guidance: float
    sampler: str
    strength: float
    marks: tuple[str, ...] = ()
    place: tuple[int, int, int] = (0, 0, 0)

    @property
    def file(self) -> str:
        """NN-SEED.png, then what the axes say of it."""
        return "-".join([f"{self.number:02d}", str(self.seed), *self.marks]) + ".png"


@dataclass(frozen=True)
class Sheets:
    """How jobs lie on sheets.

    Attributes:
        columns, rows: labels. titles: one for each sheet, of what is neither a row nor a column.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    titles: tuple[str, ...]


def axis(flag: str, told: str, given: set[str], folder: Path | None) -> Axis:
    """`AXIS=V1,V2,...` (or V1|V2|... where the values have commas in them) as an axis.

    Args:
        flag: --x or --y, for messages. given: settings that were given as flags, which an axis may not contradict.

    Raises:
        Problem: unknown axis or value, or a flag that says the same.
    """
    name, equals, rest = told.partition("=")
    name = name.strip().replace("_", "-")
    if name not in AXES or not equals:
        raise Problem(f"{flag} {told!r} is no axis.", nearest(name, AXES), f"Write AXIS=V1,V2,... with AXIS one of {', '.join(AXES)}.")
    kind, setting, label = AXES[name]
    if setting in given or name == "seed" and "count" in given:
        other = "count" if setting not in given else setting
        raise Problem(f"{flag} {name}=... and --{other.replace('_', '-')} were both given.", "Both say the same thing.", "Give one of them.")
    words = [word.strip() for word in rest.split("|" if "|" in rest else ",")]
    if not all(words):
        raise Problem(f"{flag} {told!r} has an empty value.", "", f"Write {name}=V1,V2,... without a comma too many.")
    values = tuple(value_of(flag, name, kind, word, folder) for word in words)
    if name == "artifact":
        return Axis(name, values, tuple(value.label if value else "no artifact" for value in values))
    return Axis(name, values, tuple(label.format(value) for value in values))


def value_of(flag: str, name: str, kind: Any, word: str, folder: Path | None) -> Any:
    """One value of an axis.

    Raises:
        Problem: not of its kind, or out of its bounds.
    """
    if name == "artifact":
        return None if word == NOTHING else parse(word, folder)
    if name == "sampler" and word not in SAMPLERS:
        raise Problem(f"There is no sampler {word!r} for {flag}.", nearest(word, SAMPLERS), f"Known are {', '.join(SAMPLERS)}.")
    try:
        value = kind(word)
    except ValueError:
        raise Problem(f"{flag} {name}={word} is not a number{'' if kind is float else ' without a fraction'}.", "", f"Write {name}=1,2,3.") from None
    low, high = LIMITS.get(name, (None, None))
    if low is not None and not low <= value <= high:  # a number that is none fails this as well
        raise Problem(f"{flag} {name}={word} is out of bounds.", f"It must lie between {low} and {high:g}.")
    return value


def plan(first: Job, prompts: list[str], seeds: list[int], x: Axis | None, y: Axis | None,
         told: dict[str, tuple[str, tuple[Artifact, ...]]]) -> tuple[list[Job], Sheets]:
    """All jobs in order (prompts, rows, columns, seeds), and the sheets they make.

    Without an axis the columns are the seeds and the rows the prompts; an axis given alone gets the more numerous of
    what is left beside it.

    Args:
        first: what all jobs have in common.
        told: each prompt as written -> its text without tags and the artifacts it names.
    """
    plain = {"prompt": Axis("prompt", tuple(prompts), tuple(prompts)), "seed": Axis("seed", tuple(seeds), tuple(f"seed {seed}" for seed in seeds))}
    dimensions = plain | {one.name: one for one in (x, y) if one}
    if x and y and x.name == y.name:
        raise Problem(f"--x and --y are both {x.name}.", "A sheet crosses two different things.", "Leave one out.")
    x, y = sides(x, y, plain)
    pages = [name for name in dimensions if name not in (x.name, y.name if y else "")]
    order = ["prompt", *(one.name for one in (y, x) if one and one.name not in plain), "seed"]
    jobs, titles = [], {}
    for places in walk([len(dimensions[name].values) for name in order]):
        at = dict(zip(order, places, strict=True))
        values = {name: dimensions[name].values[place] for name, place in at.items()}
        page = tuple(at[name] for name in pages)
        titles.setdefault(page, "; ".join(dimensions[name].labels[at[name]] for name in pages))
        marks = tuple(mark(dimensions[name], at[name]) for name in order if name not in plain)
        job = replace(made(first, values, told[values["prompt"]]), number=at["prompt"] + 1, marks=marks,
                      place=(list(titles).index(page), at[y.name] if y else 0, at[x.name]))
        jobs.append(job)
    return jobs, Sheets(x.labels, y.labels if y else ("",), tuple(titles.values()))


def sides(x: Axis | None, y: Axis | None, plain: dict[str, Axis]) -> tuple[Axis, Axis | None]:
    """Columns and rows: what was asked, filled up with seeds and prompts where there are several."""
    taken = {one.name for one in (x, y) if one}
    rest = [plain[name] for name in ("seed", "prompt") if name not in taken]
    several = [one for one in rest if len(one.values) > 1]
    if x is None:
        x = next(iter(several), None) or (rest[0] if y is None else Axis("", (None,), ("",)))
        several = [one for one in several if one is not x]
    if y is None:
        y = next(iter(reversed(several)), None)
    return x, y


def walk(lengths: list[int]) -> Iterator[tuple[int, ...]]:
    """All places of a grid, the last dimension fastest."""
    if not lengths:
        yield ()
        return
    for place in range(lengths[0]):
        yield from ((place, *rest) for rest in walk(lengths[1:]))


def made(first: Job, values: dict[str, Any], told: tuple[str, tuple[Artifact, ...]]) -> Job:
    """One job with the values of its axes."""
    text, named = told
    artifacts = [*first.artifacts, *([values["artifact"]] if values.get("artifact") else []), *named]
    if "strength" in values:
        artifacts = [replace(one, strength=values["strength"], text=None) for one in artifacts]
    renamed = {"seed": "seed", "steps": "steps", "guidance": "guidance", "sampler": "sampler", "denoising-strength": "strength"}
    return replace(first, prompt=values["prompt"], text=text, artifacts=tuple(artifacts),
                   **{field: values[name] for name, field in renamed.items() if name in values})


def mark(one: Axis, place: int) -> str:
    """What a file's name says of an axis: `steps10`, `dpm++`, `toy-0.5`."""
    value, twice = one.values[place], one.labels.count(one.labels[place]) > 1
    word = one.labels[place] if one.name in ("artifact", "sampler") else f"{one.name}{value:g}"
    plain = re.sub(r"[^A-Za-z0-9._+]+", "-", word).strip("-.") or one.name
    return f"{plain}-{place + 1}" if twice or plain == one.name else plain
