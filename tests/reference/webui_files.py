"""AUTOMATIC1111's and ComfyUI's reading of embeddings and hypernetworks, implemented again from docs/formats.md: arithmetic only, none of their code.

Nothing here imports the package.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

A1111_ACTIVATIONS = {"linear": None, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "swish": nn.Hardswish, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
                     "softsign": nn.Softsign, "mish": nn.Mish}
A1111_GLOBALS = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
                 ("torch", "FloatStorage"), ("torch", "HalfStorage"), ("torch", "IntStorage"), ("torch", "LongStorage"), ("torch", "DoubleStorage"),
                 ("torch", "BFloat16Storage"), ("torch.nn.modules.container", "ParameterDict"), ("__builtin__", "set")}
A1111_MEMBER = re.compile(r"^([^/]+)/((data/\d+)|version|(data\.pkl))$")  # the oldest list of names in a torch zip


def a1111_check(path: Path) -> None:
    """The web UI's look at a pickle before torch may have it: member names of a zip, and every global it would import."""
    class Listed(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in A1111_GLOBALS:
                raise AssertionError(f"global '{module}/{name}' is forbidden")
            return super().find_class(module, name)

        def persistent_load(self, saved: Any) -> Any:
            assert saved[0] == "storage"
            return None  # tensors are not rebuilt here

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                assert A1111_MEMBER.match(name), f"bad file inside {path}: {name}"
        return
    with open(path, "rb") as file:
        for _ in range(5):
            Listed(file).load() if _ != 3 else _skip_rebuild(file, Listed)


def _skip_rebuild(file: Any, listed: type[pickle.Unpickler]) -> None:
    """The object itself: tensors are not rebuilt, for their numbers come later in the file."""
    class Names(listed):  # type: ignore[valid-type, misc]
        def find_class(self, module: str, name: str) -> Any:
            super().find_class(module, name)
            return dict if name in ("OrderedDict", "ParameterDict") else set if name == "set" else (lambda *arguments: None)

    Names(file).load()


def _load(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


def a1111_embedding(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(trigger, tables): by the file's stem; one entry of `string_to_param`, the SDXL pair, or exactly one tensor."""
    if path.suffix != ".safetensors":
        a1111_check(path)
    data = _load(path)
    if "string_to_param" in data:
        table = data["string_to_param"]
        assert len(table) == 1, "embedding file has multiple terms in it"
        return path.stem, {"clip_l": next(iter(table.values())).float()}
    if "clip_g" in data and "clip_l" in data:
        return path.stem, {name: data[name].float() for name in ("clip_l", "clip_g")}
    assert isinstance(data, dict) and len(data) == 1 and isinstance(next(iter(data.values())), Tensor), "couldn't identify the file"
    table = next(iter(data.values())).float()
    return path.stem, {"clip_l": table.unsqueeze(0) if table.ndim == 1 else table}


def comfy_embedding(path: Path, encoder: str) -> Tensor:
    """The table for one encoder: the first value of `string_to_param`, else the entry named like the encoder, else the first."""
    data = _load(path)
    if "string_to_param" in data:
        return next(iter(data["string_to_param"].values()))
    return data[encoder] if encoder in data else next(iter(data.values()))


class A1111Network(nn.Module):
    """One network of a pair, built from the settings; weights must fit them by name."""

    def __init__(self, width: int, state: dict[str, Tensor], told: dict[str, Any]):
        super().__init__()
        structure, activation = told.get("layer_structure") or [1, 2, 1], told.get("activation_func")
        dropout = told.get("dropout_structure")
        layers: list[nn.Module] = []
        for place in range(len(structure) - 1):
            layers.append(nn.Linear(int(width * structure[place]), int(width * structure[place + 1])))
            last = place >= len(structure) - 2
            if activation not in (None, "linear") and not (last and not told.get("activate_output", True)):
                layers.append(A1111_ACTIVATIONS[activation]())
            if told.get("is_layer_norm"):
                layers.append(nn.LayerNorm(int(width * structure[place + 1])))
            if dropout is not None and dropout[place + 1] > 0:
                layers.append(nn.Dropout(dropout[place + 1]))
        self.linear = nn.Sequential(*layers)
        renamed = {key.replace("linear1.", "linear.0.").replace("linear2.", "linear.1."): value.float() for key, value in state.items()}
        self.load_state_dict(renamed)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def a1111_hypernetwork(path: Path) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Width -> (key network, value network)."""
    assert path.suffix == ".pt", "only *.pt is listed"
    a1111_check(path)
    data = torch.load(path, map_location="cpu", weights_only=True)
    told = {key: value for key, value in data.items() if isinstance(key, str)}
    return {width: tuple(A1111Network(width, state, told) for state in pair) for width, pair in data.items() if type(width) is int}


def comfy_hypernetwork(path: Path) -> dict[int, tuple[nn.Module, nn.Module]]:
    """The same as ComfyUI's node chains it: layers in the order of the keys, structure from the weights, its own defaults."""
    data = torch.load(path, map_location="cpu", weights_only=True)
    activation, norm, activate = data.get("activation_func"), data.get("is_layer_norm", False), data.get("activate_output", False)
    assert activation in A1111_ACTIVATIONS, f"unsupported activation {activation}"
    assert not data.get("use_dropout", False), "dropout would be active while generating"

    def chain(state: dict[str, Tensor]) -> nn.Module:
        names = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
        layers: list[nn.Module] = []
        for number, name in enumerate(names):
            weight, bias = state[f"{name}.weight"].float(), state[f"{name}.bias"].float()
            layer: nn.Module = nn.LayerNorm(weight.shape[0]) if weight.ndim == 1 else nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
            if weight.ndim == 2 and activation != "linear" and (number < len(names) - 1 or activate):
                layers.append(A1111_ACTIVATIONS[activation]())
        assert norm or all(value.ndim != 1 or key.endswith("bias") for key, value in state.items())
        return nn.Sequential(*layers)

    return {int(key): tuple(map(chain, pair)) for key, pair in data.items() if isinstance(key, int)}
