"""Hypernetworks: small residual MLPs on the inputs of attention projections, shared by all layers of one width.

The kind NovelAI introduced in 2022 and AUTOMATIC1111's web UI made common (no paper; not the HyperNetworks of Ha et al.).
For a projection with input x: to_k(x + m f(x)), the same for value and query, each with its own f per width of x. The
last layer starts at zero, so an untrained hypernetwork is exactly the base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.errors import Problem
from finetune.formats import header
from finetune.formats import hypernetwork as files
from finetune.methods.base import Group, Loaded, Method, bytes_per_number, export_dtype, files_of
from finetune.model.base import Base
from finetune.settings import TrainSettings, setting

LEAFS = {"query": "to_q", "key": "to_k", "value": "to_v"}


class Settings(TrainSettings):
    """The hypernetwork's own settings and defaults."""

    METHOD: ClassVar[str] = "hypernetwork"

    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    transform: str = setting("key,value", "projections whose input is transformed: any of query, key, value, split by commas; "
                             "only key,value loads in the web UI", group="method")
    scope: Literal["cross", "all"] = setting("cross", "cross-attention only, or self-attention as well", group="method")
    layer_structure: str = setting("1,2,1", "widths of the MLP's layers as multiples of its input", group="method")
    activation: Literal["linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "softsign", "mish"] = setting(
        "relu", "between the layers; the nine that both A1111 and ComfyUI know", group="method")
    layer_norm: bool = setting(False, "layer norm after every layer; scales start at 1, the last at 0 so that step zero is the base", group="method")
    dropout: float = setting(0.0, "dropout before the last layer while training; never exported", group="method", ge=0, lt=1)


class Mlp(nn.Module):
    """x -> f(x), numbered like the web UI's `linear` sequence so that its files and ours agree.

    Args:
        width: of input and output. structure: multiples of it, first and last 1.
        dropout: probability before the last Linear, or 0.
    """

    def __init__(self, width: int, structure: list[float], activation: str, layer_norm: bool, activate_output: bool = False, dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        last = len(structure) - 2
        for place, (now, then) in enumerate(zip(structure, structure[1:], strict=False)):
            layers.append(nn.Linear(int(width * now), int(width * then)))
            if activation != "linear" and (place < last or activate_output):
                layers.append(make_activation(activation))
            if layer_norm:
                layers.append(nn.LayerNorm(int(width * then)))
            if dropout and place == last - 1:
                layers.append(nn.Dropout(dropout))
        self.linear = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    @torch.no_grad()
    def start(self) -> None:
        """Normal(0, 0.01) as the web UI does, then zero for what is added last, so that f = 0."""
        parts = [layer for layer in self.linear if isinstance(layer, nn.Linear | nn.LayerNorm)]
        for layer in parts:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.01)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(parts[-1].weight)
        nn.init.zeros_(parts[-1].bias)


def make_activation(name: str) -> nn.Module:
    """The module behind a name of the file format; "swish" is Hardswish there, as in A1111 and ComfyUI."""
    kinds = {"relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "swish": nn.Hardswish, "tanh": nn.Tanh,
             "sigmoid": nn.Sigmoid, "softsign": nn.Softsign, "mish": nn.Mish}
    found = kinds.get(name) or next((getattr(nn, kind) for kind in nn.modules.activation.__all__ if kind.lower() == name), None)
    if found is None:
        raise Problem(f"The activation {name!r} is unknown.", f"Known are linear, {', '.join(kinds)}.")
    return found()


class Patch:
    """Forward hooks that put the networks before a UNet's attention projections.

    One input feeds many layers in cross-attention (the same text states), so the last result is remembered per network
    and reused while input, weights and gradient mode are the same: one MLP pass a step instead of sixteen.
    """

    def __init__(self, unet: nn.Module, networks: dict[tuple[int, str], nn.Module], scope: str, strength: float = 1.0):
        self.networks, self.strength, self._unet = networks, strength, unet
        self._seen: dict[tuple[int, str], tuple[Any, Tensor]] = {}
        self.places: list[str] = []
        for name, attention in unet.named_modules():
            if not all(hasattr(attention, leaf) for leaf in LEAFS.values()) or (scope == "cross" and not name.endswith("attn2")):
                continue
            for role, leaf in LEAFS.items():
                projection = getattr(attention, leaf)
                if (projection.in_features, role) in networks:
                    projection.register_forward_pre_hook(self._hook((projection.in_features, role)))
                    self.places.append(f"{name}.{leaf}")

    def _hook(self, key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not self.strength:
                return None
            x = arguments[0]
            network = self.networks[key]
            if torch.is_grad_enabled() and getattr(self._unet, "is_gradient_checkpointing", False):
                return (self._apply(network, x), *arguments[1:])  # each block is computed twice, with a graph of its own
            mark = (x, x._version, torch.is_grad_enabled(), network.training, self.strength,
                    tuple(value._version for value in network.parameters()))
            seen = self._seen.get(key)
            if seen is None or seen[0][0] is not mark[0] or seen[0][1:] != mark[1:]:
                seen = (mark, self._apply(network, x))
                self._seen[key] = seen
            return (seen[1], *arguments[1:])

        return hook

    def _apply(self, network: nn.Module, x: Tensor) -> Tensor:
        """x + m f(x), in the networks' float32 as the web UI evaluates it, cast back."""
        wide = x.to(next(network.parameters()).dtype)
        return (wide + self.strength * network(wide)).to(x.dtype)

    def forget(self) -> None:
        """Let go of remembered tensors (and their graphs)."""
        self._seen.clear()


class Hypernetwork(Method):
    """The MLPs train; the UNet stays as it is."""

    name = "hypernetwork"
    title = "Hypernetwork"
    paper = "NovelAI 2022; AUTOMATIC1111 web UI"
    Settings = Settings

    @property
    def roles(self) -> list[str]:
        """Projections to transform, checked."""
        roles = [word.strip() for word in self.settings.transform.split(",") if word.strip()]
        if not roles or set(roles) - set(LEAFS):
            raise Problem(f"--transform {self.settings.transform!r} is not a choice of query, key and value.", "",
                          "Use --transform key,value (the default, and what web UIs load), key,query or key,query,value.")
        return [role for role in ("query", "key", "value") if role in roles]

    @property
    def structure(self) -> list[float]:
        """Layer widths as multiples of the input, checked."""
        try:
            sizes = [float(word) for word in self.settings.layer_structure.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) < 2 or sizes[0] != 1 or sizes[-1] != 1 or min(sizes) <= 0:
            raise Problem(f"--layer-structure {self.settings.layer_structure!r} is not a list of multiples that begins and ends with 1.",
                          "The MLP's output is added to its input.", "Use 1,2,1 or 1,1.5,1.5,1.")
        return [int(size) if size == int(size) else size for size in sizes]

    def check(self) -> None:
        super().check()
        _ = self.roles, self.structure  # refuse what is no wiring and no structure

    def facts(self) -> list[tuple[str, str]]:
        places = "cross-attention" if self.settings.scope == "cross" else "all attention"
        return [("networks", f"{' and '.join(self.roles)} of {places}, structure {self.settings.layer_structure}, {self.settings.activation}")]

    def attach(self, base: Base) -> list[Group]:
        widths: dict[tuple[int, str], None] = {}
        for name, attention in base.unet.named_modules():
            if all(hasattr(attention, leaf) for leaf in LEAFS.values()) and (self.settings.scope == "all" or name.endswith("attn2")):
                widths.update({(getattr(attention, LEAFS[role]).in_features, role): None for role in self.roles})
        self._check_widths(base, widths)
        self.networks = nn.ModuleDict()
        for width, role in widths:
            network = Mlp(width, self.structure, self.settings.activation, self.settings.layer_norm, dropout=self.settings.dropout)
            network.start()
            self.networks[f"{width}_{role}"] = network.to(base.device)
        self._patch = Patch(base.unet, self._by_key(), self.settings.scope)
        return [Group({f"networks.{name}": value for name, value in self.networks.named_parameters()})]

    def _check_widths(self, base: Base, widths: dict[tuple[int, str], None]) -> None:
        """Networks are found by width: text states as wide as a hidden layer would share one by accident."""
        hidden = {layer.in_features for name, layer in base.unet.named_modules() if name.endswith("attn1.to_k")}
        if self.settings.scope == "all" and base.context_width in hidden:
            raise Problem(f"--scope all cannot be used with {base.name!r}.",
                          f"Its text states and one hidden layer are both {base.context_width} wide, and files tell networks apart by width.",
                          "Use --scope cross.")

    def _by_key(self) -> dict[tuple[int, str], nn.Module]:
        return {(int(name.split("_")[0]), name.split("_")[1]): network for name, network in self.networks.items()}

    @contextlib.contextmanager
    def detached(self, base: Base) -> Iterator[Any]:
        self._patch.strength = 0.0
        try:
            yield self.denoise
        finally:
            self._patch.strength = 1.0

    def after_step(self, base: Base) -> None:
        self._patch.forget()

    def training_modules(self, base: Base) -> list[nn.Module]:
        return [base.unet, self.networks]

    def expected_bytes(self, base: Base) -> int:
        numbers = sum(value.numel() for value in self.networks.parameters())
        return numbers * bytes_per_number(self.settings) * (2 if self._for_webui else 1)  # .safetensors and .pt

    @property
    def _for_webui(self) -> bool:
        """Whether the web UI's file can express these networks (and A1111 and ComfyUI agree on them)."""
        return self.roles == ["key", "value"] and not (self.settings.layer_norm and self.settings.activation != "linear")

    def targets(self) -> tuple[str, ...]:
        return ("webui",) if self._for_webui else ()

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """NAME.safetensors always; NAME.pt for web UIs where they can express it (key and value)."""
        places = [index for index, layer in enumerate(self.networks[next(iter(self.networks))].linear) if isinstance(layer, nn.Dropout)]
        dropout = [0.0] * len(self.structure)
        if places:
            dropout[-2] = self.settings.dropout
        dtype = export_dtype(self.settings)
        states = {key: {name: value.detach().to(dtype).cpu() for name, value in network.state_dict().items()}
                  for key, network in self._by_key().items()}
        content = files.HypernetworkFile(networks=states, layer_structure=self.structure, activation=self.settings.activation,
                                         layer_norm=self.settings.layer_norm, activate_output=False, dropout=dropout if places else None,
                                         scope=self.settings.scope, name=self.stem, step=self.settings.steps, base_name=base.known_as,
                                         base_hash=base.hash[:10], metadata=metadata)
        files.write_safetensors(folder / f"{self.stem}.safetensors", content, metadata)
        if self._for_webui:
            files.write_webui(folder / f"{self.stem}.pt", content)

    @classmethod
    def find(cls, path: Path) -> Path | None:
        found = files_of(path)
        for file in found:
            if file.suffix == ".safetensors" and any(key.startswith("hypernet.") for key in header.read_header(file).tensors):
                return file
        return next((file for file in found if file.suffix == ".pt" and _holds_hypernetwork(file)), None)

    @classmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        """Hook the networks in; widths the model does not have are passed over unless none is left."""
        content = files.read(path)
        networks: dict[tuple[int, str], nn.Module] = {}
        for key, state in content.networks.items():
            network = Mlp(key[0], list(content.layer_structure), content.activation, content.layer_norm, content.activate_output)
            network.load_state_dict({name: value.float() for name, value in state.items()})
            networks[key] = network.requires_grad_(False).eval().to(base.device)
        patch = Patch(base.unet, networks, content.scope, strength)
        text = {key[0] for key in networks if key[1] != "query"}
        if not patch.places or text and base.context_width not in text:
            raise Problem(f"The hypernetwork {path} does not fit the model {base.name!r}.",
                          f"Its networks are for widths {content.widths}; the model's text states are {base.context_width} wide.",
                          "Load it on a base of the family it was trained from.")
        return Loaded(cls.name, content.metadata.get("finetune.trigger"), path, dict(content.metadata))


def _holds_hypernetwork(path: Path) -> bool:
    """Whether a pickle has the integer keys of a hypernetwork."""
    from finetune.formats.pickles import load_restricted

    content = load_restricted(path)
    return isinstance(content, dict) and any(isinstance(key, int) for key in content)
