"""Hypernetwork files: the web UI's `.pt`, and a safetensors form of our own, for none exists.

A network f of a role is applied where a UNet attention layer builds that role's projection: `k = to_k(c + m f(c))`,
`v = to_v(c + m f(c))`, and, beyond the web UI, `q = to_q(h + m f(h))`. Networks are shared by all layers of one width.

safetensors form: tensors `hypernet.WIDTH.k|v|q.linear.N.weight|bias`, metadata `finetune.format` = "hypernetwork",
`finetune.format_version`, and `hypernetwork_config` = JSON of the `.pt`'s text entries, `sizes`, `transform`, `scope`.
Version 1 holds key and value networks. Any other set of roles is version 2, so that a reader of version 1 refuses it
instead of applying half of it.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem
from finetune.formats.families import family_of_width, modelspec
from finetune.formats.header import told_json
from finetune.formats.hypernetwork_file import ROLES, HypernetworkFile, StateDict, check, context_width, without_dropout
from finetune.formats.hypernetwork_layers import ACTIVATIONS
from finetune.formats.pickles import load_restricted, save_legacy
from finetune.formats.tensors import load_tensors, save_tensors

_ROLE_OF = {letter: role for role, letter in ROLES.items()}
_INNER_NAME = re.compile(r"linear\.\d+\.(?:weight|bias)")
_TENSOR_NAME = re.compile(rf"hypernet\.(\d+)\.([kvq])\.({_INNER_NAME.pattern})")
NEWEST_VERSION = 2

__all__ = ["HypernetworkFile", "check", "context_width", "read", "refuse_for_webui", "without_dropout", "write_safetensors", "write_webui"]


def write_safetensors(path: Path | str, file: HypernetworkFile, metadata: Mapping[str, str]) -> None:
    """Write the safetensors form. Dropout is left out; dtypes stay as they are."""
    path, file = Path(path), without_dropout(file)
    tensors = {
        f"hypernet.{width}.{ROLES[role]}.{key}": tensor
        for (width, role), state in file.networks.items()
        for key, tensor in state.items()
    }
    config = {**_settings(file), "sizes": file.widths, "transform": file.transform, "scope": file.scope}
    spec = modelspec(family_of_width(context_width(file), metadata), "hypernetwork", path.stem, metadata)
    described = {
        "format": "pt",
        "finetune.format": "hypernetwork",
        "finetune.format_version": "1" if file.transform == ["key", "value"] else str(NEWEST_VERSION),
        "hypernetwork_config": json.dumps(config),
        **spec,
        **file.metadata,
        **metadata,
    }
    save_tensors(path, tensors, described, {"modelspec.hash_sha256": "0x"})


def write_webui(path: Path | str, file: HypernetworkFile) -> None:
    """Write the `.pt` that A1111 and ComfyUI read.

    Raises:
        Problem: for what one of the two cannot express or would compute differently.
    """
    path = Path(path)
    file = without_dropout(file)
    refuse_for_webui(file, path)
    content: dict[Any, Any] = {}
    for width in file.widths:  # OrderedDict is the type `state_dict()` gives and every reader has seen
        content[width] = tuple(OrderedDict(file.networks[width, role]) for role in ("key", "value"))
    # Readers pass over text keys they do not know, so ours ride along.
    ours = {key: value for key, value in file.metadata.items() if key.startswith("finetune.")}
    save_legacy(content | _settings(file) | {"scope": file.scope} | ({"finetune": ours} if ours else {}), path)


def refuse_for_webui(file: HypernetworkFile, path: Path) -> None:
    """Raise a Problem when the web UI's `.pt` cannot say what this hypernetwork computes."""
    if set(file.networks) != {(width, role) for width in file.widths for role in ("key", "value")}:
        raise Problem(
            f"A hypernetwork for {' and '.join(file.transform)} cannot be written as {path.name}.",
            "The web UI's file holds one (key, value) pair for each width and has no place for anything else.",
            "Train with transform key and value for the web UI, or keep the .safetensors for finetune.",
        )
    if file.activation not in ACTIVATIONS:
        raise Problem(
            f"Activation {file.activation!r} cannot be written to {path.name}.",
            "ComfyUI refuses files with other activations than the nine common ones.",
            f"Train with one of {', '.join(ACTIVATIONS)}.",
        )
    if file.layer_norm and file.activation != "linear" and not file.activate_output:
        raise Problem(
            f"Layer norm with activation {file.activation!r} and activate_output off cannot be written to {path.name}.",
            "A1111 leaves the last layer without activation; ComfyUI counts LayerNorms as layers and activates it.",
            "Train with activate_output on, or without layer norm.",
        )
    if file.name != path.stem:
        raise Problem(
            f"The hypernetwork is named {file.name!r} but its file {path.name!r}.",
            "A1111 remembers loaded networks by the inner name and looks them up by the file name.",
            f"Write it to {file.name}.pt.",
        )


def _settings(file: HypernetworkFile) -> dict[str, Any]:
    """The text-keyed entries of A1111's file, from plain types only."""
    return {
        "step": int(file.step),
        "name": file.name,
        "layer_structure": list(file.layer_structure),
        "activation_func": file.activation,
        "is_layer_norm": bool(file.layer_norm),
        "weight_initialization": file.weight_init,
        "sd_checkpoint": file.base_hash,
        "sd_checkpoint_name": file.base_name,
        "activate_output": bool(file.activate_output),
        "use_dropout": False,
        "dropout_structure": [0.0] * len(file.layer_structure),
        "last_layer_dropout": False,
        "optional_info": file.note,
    }


def read(path: Path | str) -> HypernetworkFile:
    """Read a hypernetwork from `.pt` (A1111, NovelAI lists, old linear1/linear2 names) or our safetensors form.

    Returns: the file with dropout-free numbering.

    Raises:
        Problem: when it is something else, newer than this reader, or contradicts itself.
    """
    path = Path(path)
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_webui(path)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise Problem(f"{path} is not a hypernetwork that can be read.", f"Its settings are damaged ({error}).", "Get the file again, or export it again.") from error


def _read_safetensors(path: Path) -> HypernetworkFile:
    tensors, metadata = load_tensors(path)
    if metadata.get("finetune.format") != "hypernetwork":
        raise Problem(
            f"{path} is not a hypernetwork of finetune.",
            "Its metadata lacks finetune.format = hypernetwork, and no other safetensors form of hypernetworks exists.",
            "Use the .pt file instead.",
        )
    version = metadata.get("finetune.format_version", "")
    if not re.fullmatch(r"[0-9]{1,9}", version) or int(version) > NEWEST_VERSION:
        raise Problem(
            f"{path} has hypernetwork format version {version!r}; this finetune reads up to {NEWEST_VERSION}.",
            "A newer version may compute something this one cannot.",
            "Update finetune.",
        )
    config = told_json(path.name, metadata, "hypernetwork_config")
    networks: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(key)
        if match is None:
            raise _strange_key(path, key)
        networks.setdefault((int(match[1]), _ROLE_OF[match[2]]), {})[match[3]] = tensor
    order = [(width, role) for width in config.get("sizes", []) for role in ROLES if (width, role) in networks]
    if set(order) != set(networks):
        raise Problem(
            f"{path} lists the sizes {config.get('sizes')}, but holds networks for {sorted(networks)}.",
            "Its settings and its weights do not belong together.",
            "Export it again.",
        )
    ordered = {place: _numeric(path, networks[place]) for place in order}
    return without_dropout(_file(ordered, config, path, metadata))


def _read_webui(path: Path) -> HypernetworkFile:
    content = load_restricted(path)
    pairs = {key: value for key, value in content.items() if type(key) is int} if isinstance(content, dict) else {}
    if not pairs:
        raise Problem(
            f"{path} is not a hypernetwork.",
            "A hypernetwork file has whole numbers as keys, the widths its networks act on.",
            "Run `finetune inspect` on it to see what it is.",
        )
    networks = {}
    for width, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(state, Mapping) for state in pair):
            raise Problem(
                f"{path} holds no pair of networks for width {width}.",
                "The web UI's file has one (key, value) pair of state dicts for each width.",
                "It is damaged or of another kind.",
            )
        for role, state in zip(("key", "value"), pair, strict=True):
            networks[width, role] = _numeric(path, {_modern(key): tensor for key, tensor in state.items()})
    told = {key: value for key, value in content.items() if isinstance(key, str)}
    ours = told.get("finetune")
    metadata = {str(key): str(value) for key, value in ours.items()} if isinstance(ours, dict) else {}
    return without_dropout(_file(networks, told, path, metadata))


def _modern(key: Any) -> str:
    """linear1.weight and linear2.weight of the first files mean linear.0 and linear.1."""
    return str(key).replace("linear1.", "linear.0.", 1).replace("linear2.", "linear.1.", 1)


def _numeric(path: Path, state: StateDict) -> dict[str, torch.Tensor]:
    """Keys by module number, weight before bias."""
    for key, tensor in state.items():
        if _INNER_NAME.fullmatch(key) is None or not isinstance(tensor, torch.Tensor):
            raise _strange_key(path, key)
    order = sorted(state, key=lambda key: (int(key.split(".")[1]), key.endswith("bias")))
    return {key: state[key] for key in order}


def _strange_key(path: Path, key: str) -> Problem:
    return Problem(
        f"{path} has the entry {key!r}, which no hypernetwork has.",
        "Networks consist of tensors named linear.N.weight and linear.N.bias.",
        "It is damaged or of another kind.",
    )


def _file(
    networks: Mapping[tuple[int, str], StateDict], told: Mapping[str, Any], path: Path, metadata: dict[str, str]
) -> HypernetworkFile:
    """Settings with A1111's defaults for what a file leaves out."""
    structure = list(told.get("layer_structure") or [1, 2, 1])
    dropout = told.get("dropout_structure")
    if dropout is None and told.get("use_dropout"):  # the first files with dropout had 0.3 at every inner boundary
        last = 0.3 if told.get("last_layer_dropout") else 0.0
        dropout = [0.0, *[0.3] * (len(structure) - 3), last, 0.0]
    return HypernetworkFile(
        networks=networks,
        layer_structure=structure,
        activation=told.get("activation_func") or "linear",
        layer_norm=bool(told.get("is_layer_norm", False)),
        activate_output=bool(told.get("activate_output", True)),
        dropout=dropout,
        scope=told.get("scope") or "all",
        name=told.get("name") or path.stem,
        step=int(told.get("step") or 0),
        weight_init=told.get("weight_initialization") or "Normal",
        base_name=told.get("sd_checkpoint_name"),
        base_hash=told.get("sd_checkpoint"),
        note=told.get("optional_info"),
        metadata=metadata,
    )
