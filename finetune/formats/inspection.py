"""What `finetune inspect` finds out about a file or folder, and how it is told. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.formats.families import Family

KINDS = (
    "lora",
    "embedding",
    "hypernetwork",
    "diffusers-folder",
    "single-file-checkpoint",
    "finetune-run",
    "finetune-artifact",
    "unknown",
)
# Metadata worth showing, by who wrote it: key to label.
_TRAINED_ON = {
    "finetune.method": "method",
    "finetune.base": "base",
    "finetune.base_hash": "base hash",
    "finetune.steps": "steps",
    "finetune.seed": "seed",
    "finetune.class_noun": "class noun",
    "finetune.versions": "versions",
    "finetune.licence": "licence",
    "ss_sd_model_name": "base",
    "ss_steps": "steps",
    "ss_seed": "seed",
    "ss_learning_rate": "learning rate",
    "sd_checkpoint_name": "base",
    "sd_checkpoint": "base hash",
    "step": "steps",
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
        vectors, width: of an embedding.
        settings: a hypernetwork's, or a checkpoint's, name to text.
        trigger: word to type.
        trained_on: label to text, from the metadata.
        readers: (program, verdict).
        warnings: sentences.
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
    vectors: int = 0
    width: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    trigger: str | None = None
    trained_on: dict[str, str] = field(default_factory=dict)
    readers: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    children: list[Report] = field(default_factory=list)


def trained_on(metadata: Mapping[str, str]) -> dict[str, str]:
    """The part of a file's metadata that says how it came about; our own fields win over others'."""
    told: dict[str, str] = {}
    for key, label in _TRAINED_ON.items():
        value = metadata.get(key, "")
        if value not in ("", "None"):
            told.setdefault(label, value)
    return told


def trigger_of(metadata: Mapping[str, str]) -> str | None:
    """The word to type, as the metadata states it."""
    return metadata.get("finetune.trigger") or metadata.get("modelspec.trigger_phrase") or None


def lines(report: Report) -> list[tuple[str, str]]:
    """A report as (label, text) lines for printing, parts of a folder indented below it."""
    return list(_lines(report, ""))


def _lines(report: Report, indent: str) -> Iterator[tuple[str, str]]:
    yield indent + "file" if report.path.is_file() else indent + "folder", str(report.path)
    yield indent + "kind", report.kind + (f" ({report.layout})" if report.layout else "")
    for label, text in _facts(report):
        yield indent + label, text
    for program, verdict in report.readers:
        yield indent + program, verdict
    for warning in report.warnings:
        yield indent + "warning", warning
    for child in report.children:
        yield from _lines(child, indent + "  ")


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """The filled fields in words."""
    if report.family is not None:
        yield "base model", report.family.title
    if report.trigger:
        yield "trigger", report.trigger
    if report.ranks:
        alphas = ", ".join(f"{alpha:g}" for alpha in report.alphas) or "none stored (equal to the rank)"
        yield "rank", f"{', '.join(map(str, report.ranks))}; alpha {alphas}"
    if report.modules:
        unit = "modules" if report.ranks else "parameters"
        yield "contents", ", ".join(f"{name} {count:,} {unit}" for name, count in report.modules.items())
    if report.vectors:
        yield "vectors", f"{report.vectors} of width {report.width}"
    yield from report.settings.items()
    if report.parameters:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(report.dtypes.items()))
        yield "parameters", f"{report.parameters:,}" + (f" in tensors: {kinds}" if kinds else "")
    yield "bytes", f"{report.bytes:,}"
    if report.sha256:
        yield "sha256", report.sha256
    for label, text in report.trained_on.items():
        yield f"trained: {label}", text
