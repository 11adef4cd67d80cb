"""What `finetune inspect` finds out about a file or folder, and how it is told. Torch-free."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.formats.families import Family
from finetune.formats.readers import Reader

KINDS = {
    "lora": "LoRA",
    "embedding": "embedding (textual inversion)",
    "hypernetwork": "hypernetwork",
    "diffusers-folder": "whole model, diffusers folder",
    "single-file-checkpoint": "whole model, single file",
    "variant-delta": "changes that turn a base into its variant",
    "picture": "picture",
    "finetune-run": "training run of finetune",
    "finetune-artifact": "artifact of finetune",
    "unknown": "unknown",
}
# Metadata worth showing, by who wrote it: key to label.
_TRAINED_ON = {
    "finetune.method": "method",
    "finetune.base": "base",
    "finetune.base_hash": "base hash",
    "finetune.steps": "steps",
    "finetune.seed": "seed",
    "finetune.class_noun": "class noun",
    "finetune.prediction_type": "predicts",
    "finetune.versions": "versions",
    "finetune.licence": "licence",
    "ss_sd_model_name": "base",
    "ss_steps": "steps",
    "ss_seed": "seed",
    "ss_learning_rate": "learning rate",
    "sd_checkpoint_name": "base",
    "sd_checkpoint": "base hash",
    "step": "steps",
    "modelspec.prediction_type": "predicts",
    "modelspec.license": "licence",
}


@dataclass
class Report:
    """Findings about one artifact; fields that do not apply stay empty.

    Attributes:
        kind: one of KINDS.
        layout: which program's spelling, in words.
        family: base model the widths fit.
        bytes: size on disk, folders with everything in them.
        sha256: of the file; None for folders and files too large to hash in passing.
        parameters: elements of all tensors.
        dtypes: safetensors dtype to number of tensors.
        ranks, alphas: distinct values over a LoRA's modules, ascending; no alphas when the file has none.
        modules: component to number of LoRA modules, or component to parameters for checkpoints.
        part_bytes: component to bytes of its tensors.
        vectors, width: of an embedding.
        settings: a hypernetwork's, a checkpoint's or a picture's, name to text.
        trigger: word to type.
        trained_on: label to text, from the metadata.
        readers: what each program makes of it, in the order of readers.PROGRAMS.
        warnings: sentences: what would go wrong where.
        remedies: (purpose, command) pairs: what to do about it.
        children: reports on the parts of a folder.
    """

    path: Path
    kind: str = "unknown"
    layout: str = ""
    family: Family | None = None
    bytes: int = 0
    sha256: str | None = None
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    modules: dict[str, int] = field(default_factory=dict)
    part_bytes: dict[str, int] = field(default_factory=dict)
    vectors: int = 0
    width: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    trigger: str | None = None
    trained_on: dict[str, str] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    remedies: list[tuple[str, str]] = field(default_factory=list)
    children: list[Report] = field(default_factory=list)

    def reader(self, program: str) -> Reader:
        """What one program makes of it.

        Raises:
            KeyError: nothing is known of that program and this kind of file.
        """
        return {reader.program: reader for reader in self.readers}[program]

    def title(self) -> str:
        """Kind and layout in words."""
        return KINDS[self.kind] + (f", {self.layout}" if self.layout else "")


def trained_on(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a file's metadata that says how it came about; our own fields win over others'."""
    told: dict[str, str] = {}
    for key, label in _TRAINED_ON.items():
        value = metadata.get(key, "")
        if value not in ("", "None"):
            told.setdefault(label, str(value))
    return told


def trigger_of(metadata: Mapping[str, str]) -> str | None:
    """The word to type, as the metadata states it."""
    return metadata.get("finetune.trigger") or metadata.get("modelspec.trigger_phrase") or None


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """The filled fields as (label, text), in signs that only show: a stranger's file could tell a terminal what to do."""
    for label, text in _fields(report):
        yield label, "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def _fields(report: Report) -> Iterator[tuple[str, str]]:
    if report.family is not None:
        yield "base model", report.family.title
    if report.trigger:
        yield "trigger", report.trigger
    if report.ranks:
        alphas = ", ".join(f"{alpha:g}" for alpha in report.alphas) or "none stored (equal to the rank)"
        yield "rank", f"{', '.join(map(str, report.ranks))}; alpha {alphas}"
    for name, count in report.modules.items():
        unit = "modules" if report.kind == "lora" else "parameters"
        size = f", {report.part_bytes[name]:,} bytes" if name in report.part_bytes else ""
        yield name, f"{count:,} {unit}{size}"
    if report.vectors:
        yield "vectors", f"{report.vectors} of width {report.width}" + (" and 1280" if report.layout == "SDXL pair" else "")
    yield from report.settings.items()
    if report.parameters:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(report.dtypes.items()))
        yield "parameters", f"{report.parameters:,}" + (f" in tensors: {kinds}" if kinds else "")
    yield "size", f"{report.bytes:,} bytes"
    if report.sha256:
        yield "sha256", report.sha256
    yield from _training(report.trained_on)


def _training(told: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What the metadata says of the training, in as few lines as can be."""
    if "base" in told or "base hash" in told:
        hashed = f"hash {told['base hash']}" if "base hash" in told else ""
        yield "trained on", f"{told['base']} ({hashed})" if hashed and "base" in told else told.get("base", hashed)
    parts = [told[label] for label in ("method",) if label in told]
    parts += [f"{told['steps']} steps"] if "steps" in told else []
    parts += [f"{label} {told[label]}" for label in ("seed", "learning rate", "class noun", "predicts") if label in told]
    if parts:
        yield "training", ", ".join(parts)
    for label, name in (("command", "made by"), ("versions", "made with"), ("licence", "licence")):
        if label in told:
            yield name, told[label]


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values, for programs; empty fields are left out."""
    plain = asdict(report)
    plain["path"] = str(report.path)
    plain["family"] = None if report.family is None else {"key": report.family.key, "title": report.family.title}
    plain["remedies"] = [{"purpose": purpose, "command": command} for purpose, command in report.remedies]
    plain["children"] = [as_json(child) for child in report.children]
    return {key: value for key, value in plain.items() if value not in (None, "", [], {}, 0)}


def grouped(findings: Iterable[Any]) -> list[str]:
    """The acceptance list's findings as warnings: those that differ only in the tensor or module they begin with become one."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        first, _, rest = finding.text.partition(" ")
        named = "_" in first or "." in first.rstrip(".")
        found.setdefault(rest if named else finding.text, []).append(finding.text)
    return [f"{texts[0]}" + (f" ({len(texts) - 1} others like it.)" if len(texts) > 1 else "") for texts in found.values()]


def file_name(text: str) -> str:
    """A trigger or a name in letters that can stand in a file's name everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "artifact"


def convert(path: Path, layout: str, output: str, purpose: str, more: str = "") -> tuple[str, str]:
    """A remedy: the command that writes a file in another layout."""
    words = ["finetune", "convert", shlex.quote(str(path)), *more.split(), "--to", layout, "--output", shlex.quote(output)]
    return purpose, " ".join(words)
