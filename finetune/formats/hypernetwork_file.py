"""What a hypernetwork file holds, and the check that its settings and its weights belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from finetune.errors import Problem
from finetune.formats.hypernetwork_layers import expected_shapes, weight_indices

ROLES = {"key": "k", "value": "v", "query": "q"}
StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class HypernetworkFile:
    """A hypernetwork as a file holds it.

    Attributes:
        networks: (width, "query" | "key" | "value") to a state dict `linear.N.weight|bias`. Width is that of the
            network's input: text or hidden states for key and value, hidden states for query.
        layer_structure: widths as multiples of the input's, first and last 1.
        activation: one of the names both web UI and ComfyUI know, or any of torch's in lower case.
        layer_norm: LayerNorm after every Linear.
        activate_output: activation after the last Linear too.
        dropout: probabilities the networks' numbering counts, as long as `layer_structure`; None for none. Files are
            always written without dropout and renumbered.
        scope: "cross" (text attention only) or "all" (every attention whose context has a known width).
        name: the inner name; must equal the file's stem.
        step: optimizer steps trained.
        weight_init: "Normal", "XavierUniform", ... as A1111 spells them.
        base_name: checkpoint trained on.
        base_hash: its short hash.
        note: A1111's `optional_info`.
        metadata: text to text.
    """

    networks: Mapping[tuple[int, str], StateDict]
    layer_structure: list[float] = field(default_factory=lambda: [1, 2, 1])
    activation: str = "linear"
    layer_norm: bool = False
    activate_output: bool = True
    dropout: list[float] | None = None
    scope: str = "all"
    name: str = ""
    step: int = 0
    weight_init: str = "Normal"
    base_name: str | None = None
    base_hash: str | None = None
    note: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> list[int]:
        """Input widths, in file order."""
        return list(dict.fromkeys(width for width, _ in self.networks))

    @property
    def transform(self) -> list[str]:
        """Roles that have networks: any of "query", "key", "value"."""
        present = {role for _, role in self.networks}
        return [role for role in ("query", "key", "value") if role in present]

    @property
    def parameters(self) -> int:
        """Elements of all networks."""
        return sum(tensor.numel() for state in self.networks.values() for tensor in state.values())


def without_dropout(file: HypernetworkFile) -> HypernetworkFile:
    """The same networks numbered as if no dropout had been there, keys in numeric order.

    ComfyUI leaves networks in training mode, so dropout written into a file would act while generating.

    Raises:
        Problem: when keys or shapes contradict the structure.
    """
    check(file)
    shape = (file.layer_structure, file.activation, file.layer_norm, file.activate_output)
    old, new = weight_indices(*shape, file.dropout), weight_indices(*shape)
    renumbered = {}
    for place, state in file.networks.items():
        renumbered[place] = {
            f"linear.{after}.{part}": state[f"linear.{before}.{part}"]
            for (before, _), (after, _) in zip(old, new, strict=True)
            for part in ("weight", "bias")
        }
    return replace(file, networks=renumbered, dropout=None)


def check(file: HypernetworkFile) -> None:
    """Recompute every key and shape from the settings; raise a Problem naming the first that differs."""
    structure = file.layer_structure
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1:
        raise Problem(
            f"The hypernetwork's layer structure {structure} does not begin and end with 1.",
            "Its output is added to its input, so both have one width.",
            "Use a structure such as [1, 2, 1].",
        )
    if not file.networks:
        raise Problem("The hypernetwork has no networks.", fix="Choose at least one width and role.")
    for (width, role), state in file.networks.items():
        if role not in ROLES:
            raise Problem(f"Hypernetwork role {role!r} is unknown.", fix=f"Use {', '.join(ROLES)}.")
        wanted = expected_shapes(
            width, structure, file.activation, file.layer_norm, file.activate_output, file.dropout
        )
        found = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if found != wanted:
            key = next(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
            raise Problem(
                f"The hypernetwork's {role} network for width {width} has {key} of shape {found.get(key, 'none')}, "
                f"but its settings ask for {wanted.get(key, 'none')}.",
                f"Structure {structure}, activation {file.activation}, layer norm {file.layer_norm}.",
                "The file's settings and weights do not belong together.",
            )


def context_width(file: HypernetworkFile) -> int | None:
    """Width of the text states: the key or value width that is not a hidden width of a published UNet."""
    widths = [width for width, role in file.networks if role != "query"]
    text = [width for width in widths if width in (768, 1024, 2048)]
    return (text or widths or [None])[0]
