"""The table of methods. A new method is one file, one line here (or an entry point `finetune.methods`), one recipe.

Importing this package does not import torch; `get` imports the method's module.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import Problem, nearest

if TYPE_CHECKING:
    from finetune.methods.base import Loaded, Method
    from finetune.model import Base

TABLE: dict[str, tuple[str, str]] = {
    "dreambooth": ("finetune.methods.dreambooth:DreamBooth", "train the whole UNet, with prior preservation"),
    "textual-inversion": ("finetune.methods.textual_inversion:TextualInversion", "learn the embedding of one new word"),
    "lora": ("finetune.methods.lora:Lora", "train low-rank adapters on the attention layers"),
    "hypernetwork": ("finetune.methods.hypernetwork:Hypernetwork", "train small MLPs on the inputs of attention"),
    "pretrain": ("finetune.methods.pretrain:Pretrain", "train everything in a UNet from nothing"),
}
HIDDEN = ("pretrain",)


def names() -> dict[str, str]:
    """Method name -> one-line summary: the table, then methods other packages bring."""
    found = {name: summary for name, (_, summary) in TABLE.items() if name not in HIDDEN}
    for point in entry_points(group="finetune.methods"):
        found.setdefault(point.name, f"from the package {point.dist.name if point.dist else '?'}")
    return found


def get(name: str) -> type[Method]:
    """The class of a method by name.

    Raises:
        Problem: there is none, naming the nearest.
    """
    if name in TABLE:
        module, _, attribute = TABLE[name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group="finetune.methods"):
        if point.name == name:
            return point.load()
    raise Problem(f"There is no method {name!r}.", nearest(name, names()), f"Known are {', '.join(names())}.")


def load_artifact(base: Base, path: Path | str, strength: float = 1.0) -> Loaded:
    """Put an artifact (file or folder) onto a fresh base; its kind is found from the files alone.

    Raises:
        Problem: missing, of no known kind, or for a model of another width or prediction.
    """
    method, found = _kind(Path(path).expanduser())
    return _fitting(base, method.load(base, found, strength))


def load_artifacts(base: Base, artifacts: list[tuple[Path, float]]) -> list[Loaded]:
    """Put several (path, strength) onto a fresh base, whole networks first; results in the order given.

    Raises:
        Problem: as `load_artifact`, or two whole networks.
    """
    kinds = [(place, *_kind(Path(path).expanduser()), strength) for place, (path, strength) in enumerate(artifacts)]
    whole = [found for _, method, found, _ in kinds if method.replaces]
    if len(whole) > 1:
        raise Problem(f"{whole[0]} and {whole[1]} are both whole networks.", "The second would replace the first.", "Load one of them.")
    loaded = {place: _fitting(base, method.load(base, found, strength)) for place, method, found, strength in sorted(kinds, key=lambda kind: not kind[1].replaces)}
    return [loaded[place] for place in range(len(artifacts))]


def _fitting(base: Base, loaded: Loaded) -> Loaded:
    """The same, when it was trained on a base that predicts what this one does."""
    from finetune.model.words import check_prediction

    check_prediction(base, loaded.metadata, loaded.path)
    return loaded


def _kind(path: Path) -> tuple[type[Method], Path]:
    """The method whose artifact lies at a path, and the file or folder to read."""
    if not path.exists():
        raise Problem(f"There is no artifact at {path}.", "", "Name the `artifact` folder of a run, or a file in it.")
    if (path / "artifact").is_dir() and (path / "manifest.json").is_file():
        path = path / "artifact"
    for name in names():
        method = get(name)
        if (found := method.find(path)) is not None:
            return method, found
    raise Problem(f"{path} is no artifact that can be loaded.", "It is no LoRA, embedding, hypernetwork or diffusers folder.",
                  f"`finetune inspect {path}` says what it is.")
