"""The module numbering inside a hypernetwork file: which index carries which weights, and of what shape.

One `nn.Sequential` named `linear` holds Linear, activation, LayerNorm and Dropout modules; keys are `linear.N.weight`
where N counts all of them, also those without weights.
"""

from __future__ import annotations

from collections.abc import Sequence

# The names both A1111 and ComfyUI understand. "swish" is torch's Hardswish in both.
ACTIVATIONS = ("linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "softsign", "mish")


def weight_indices(
    layer_structure: Sequence[float],
    activation: str | None,
    layer_norm: bool,
    activate_output: bool,
    dropout: Sequence[float] | None = None,
) -> list[tuple[int, str]]:
    """Indices of the modules that carry weights, with their kind, in file order.

    Args:
        layer_structure: widths as multiples of the input's, first and last 1.
        activation: a name, or None or "linear" for none.
        layer_norm: a LayerNorm after every Linear, after its activation.
        activate_output: whether the last Linear is activated too.
        dropout: probability by layer boundary, as long as `layer_structure`; None for none.

    Returns: (index, "linear" or "norm") pairs.
    """
    found, index = [], 0
    last = len(layer_structure) - 2
    for layer in range(last + 1):
        found.append((index, "linear"))
        index += 1
        if activation not in (None, "linear") and (layer < last or activate_output):
            index += 1
        if layer_norm:
            found.append((index, "norm"))
            index += 1
        if dropout is not None and dropout[layer + 1] > 0:
            index += 1
    return found


def expected_shapes(
    width: int,
    layer_structure: Sequence[float],
    activation: str | None,
    layer_norm: bool,
    activate_output: bool,
    dropout: Sequence[float] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Every key of one network's state dict with its shape, in numeric order (arguments as `weight_indices`)."""
    sizes = [int(width * multiple) for multiple in layer_structure]
    shapes: dict[str, tuple[int, ...]] = {}
    layer = 0
    for index, kind in weight_indices(layer_structure, activation, layer_norm, activate_output, dropout):
        if kind == "linear":
            layer += 1
            weight: tuple[int, ...] = (sizes[layer], sizes[layer - 1])
        else:
            weight = (sizes[layer],)
        shapes[f"linear.{index}.weight"] = weight
        shapes[f"linear.{index}.bias"] = (sizes[layer],)
    return shapes
