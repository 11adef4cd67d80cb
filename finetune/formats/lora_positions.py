"""cloneofsimo's LoRA files, which number modules by their place in the model (github.com/cloneofsimo/lora).

A key is `unet:7:up`: the eighth linear layer found below the modules whose class the metadata lists. The count therefore
depends on the order in which the model creates its modules. diffusers changed that order once: a transformer block used
to make attn1, ff, attn2, and now makes attn1, attn2, ff. Shapes tell which of the two a file was counted in.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import Tensor

from finetune.errors import Problem
from finetune.formats.header import told_json

RENAMED = {"CrossAttention": "Attention"}  # classes that diffusers calls otherwise today
_BLOCK = re.compile(r"(.*transformer_blocks\.\d+)\.")
DEFAULTS = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}


@dataclass(frozen=True)
class Place:
    """A layer with a weight, in the model's own order.

    Attributes:
        name: dotted path within its component.
        above: class names of the modules it lies in, outermost first.
        shape: of its weight.
    """

    name: str
    above: tuple[str, ...]
    shape: tuple[int, ...]


def places_of(network: Any) -> list[Place]:
    """Every linear and convolution layer of a network, in the order its modules were made."""
    from torch import nn

    modules = dict(network.named_modules())
    found = []
    for name, layer in modules.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            words = name.split(".")
            parents = (modules.get(".".join(words[:place])) for place in range(len(words)))
            found.append(Place(name, tuple(type(parent).__name__ for parent in parents if parent is not None), tuple(layer.weight.shape)))
    return found


def resolve(
    file: str, groups: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str], places: Mapping[str, Sequence[Place]] | None
) -> dict[str, str]:
    """Module names of numbered keys: "unet:7" to "unet.down_blocks...".

    Args:
        groups: "unet:7" to its "up" and "down".
        metadata: `unet` and `text_encoder` hold JSON lists of class names.
        places: component to the model's layers in order; None refuses.

    Raises:
        Problem: no model was given, or the file was counted in another one.
    """
    if places is None:
        raise Problem(f"{file} is in cloneofsimo's layout, which numbers modules by position.",
                      "Which module a number means can only be told with the base it was trained on.",
                      f"Name the base: `finetune convert {PurePath(file).name} --model BASE`.")
    names: dict[str, str] = {}
    for component in sorted({key.partition(":")[0] for key in groups}):
        mine = sorted((key for key in groups if key.startswith(f"{component}:")), key=lambda key: int(key.partition(":")[2]))
        targets = _targets(metadata.get(component), component)
        layers = [place for place in places.get(component, ()) if targets & set(place.above)]
        wanted = [(groups[key]["up"].shape[0], groups[key]["down"].shape[1]) for key in mine]
        found = _fitting(layers, wanted)
        if found is None or [int(key.partition(":")[2]) for key in mine] != list(range(len(mine))):
            raise Problem(f"{file} numbers {len(mine)} layers of the {component}, which do not fit this base.",
                          f"The base has {len(layers)} layers below {', '.join(sorted(targets))}, or others in that order.",
                          "Name the base it was trained on.")
        names |= {key: f"{component}.{place.name}" for key, place in zip(mine, found, strict=True)}
    return names


def _targets(listed: str | None, component: str) -> set[str]:
    names = told_json("the LoRA", {component: listed}, component, list) if listed else DEFAULTS[component]
    return {RENAMED.get(name, name) for name in map(str, names)}


def _fitting(layers: list[Place], wanted: list[tuple[int, int]]) -> list[Place] | None:
    """The layers in the order whose shapes are the wanted (out, in) pairs, or None."""
    linear = [place for place in layers if len(place.shape) == 2]
    for chosen in (layers, linear):
        for ordered in (chosen, _old_order(chosen)):
            if [place.shape[:2] for place in ordered] == wanted:
                return ordered
    return None


def _old_order(layers: list[Place]) -> list[Place]:
    """The same layers with `ff` between attn1 and attn2 in each transformer block."""
    ordered: list[Place] = []
    for _, block in itertools.groupby(layers, key=lambda place: _BLOCK.match(place.name)[1] if _BLOCK.match(place.name) else place.name):
        ordered += sorted(block, key=lambda place: "attn2." in place.name)  # stable: only attn2 moves behind ff
    return ordered
