"""Reading a LoRA file in any layout, with every kind of adapter that people put into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import Problem
from finetune.formats import lora_names, lora_positions
from finetune.formats.lora_keys import NUMBERED, adapter_alphas, kind_of, missing_part, sort_keys
from finetune.formats.lora_kinds import (
    Adapter,
    DoraModule,
    FullModule,
    LohaModule,
    LokrModule,
    LoraModule,
    OftModule,
)
from finetune.formats.lora_positions import Place
from finetune.formats.tensors import load_tensors


@dataclass(frozen=True)
class Adapters:
    """What a file holds.

    Attributes:
        modules: canonical module name ("unet.down_blocks...") to adapter, tensors as stored.
        metadata: of the file; "finetune.ignored" names the words left out.
        words: learned words bundled in: token -> (vectors, width); of SDXL's pair NAME.clip_l and NAME.clip_g.
    """

    modules: dict[str, Adapter]
    metadata: dict[str, str]
    words: dict[str, Tensor] = field(default_factory=dict)

    def rows(self) -> dict[str, list[Tensor]]:
        """The bundled words with their rows for each text encoder: one table, or SDXL's two in the order of its encoders."""
        found: dict[str, list[Tensor]] = {}
        for token in sorted(self.words, key=lambda token: token.endswith(".clip_g")):
            found.setdefault(token.removesuffix(".clip_l").removesuffix(".clip_g"), []).append(self.words[token])
        return found

    @property
    def kinds(self) -> list[str]:
        """The kinds of adapters, sorted."""
        return sorted({module.kind for module in self.modules.values()})


def read_adapters(
    path: Path | str, module_names: Iterable[str] | None = None, places: Mapping[str, Sequence[Place]] | None = None
) -> Adapters:
    """Read adapters of any kind: kohya, LyCORIS, PEFT, diffusers' spellings, cloneofsimo's; or a folder of PEFT's.

    Args:
        module_names: the model's dotted names, each beginning with its component, to resolve kohya's underscores
            exactly; None uses the grammar of Stable Diffusion's module names.
        places: component to the model's modules in order (`lora_positions.places_of`); cloneofsimo's files need it.

    Raises:
        Problem: for a layout or an adapter that is not known here, naming the key.
    """
    if Path(path).is_dir():
        from finetune.formats.lora_peft import read_folder

        return read_folder(Path(path))
    tensors, metadata = load_tensors(path)
    file = Path(path).name
    groups, ignored = sort_keys(file, tensors, metadata)
    if not groups:
        raise Problem(f"{file} holds no LoRA modules.", f"It has {len(tensors)} tensors of another kind.",
                      "`finetune inspect` says what it is.")
    numbered = {key for key in groups if NUMBERED.fullmatch(f"{key}:up")}
    positions = lora_positions.resolve(file, {key: groups[key] for key in numbered}, metadata, places) if numbered else {}
    known = None if module_names is None else lora_names.index_names(module_names)
    declared = adapter_alphas(metadata)
    modules: dict[str, Adapter] = {}
    for key, parts in groups.items():
        if (lacking := missing_part(parts)) is not None:
            raise Problem(f"{file}: {kind_of(parts)} module {key!r} has no {lacking} weight.",
                          "A module needs all its parts.", "The file is incomplete: export it again.")
        if key in numbered:
            name = positions[key]
        else:
            name = lora_names.canonical(key) if "." in key else lora_names.from_kohya(key, known)
        if name in modules:
            raise Problem(f"{file} holds {name!r} twice, under two spellings.", fix="Export it again.")
        alpha = parts["alpha"].reshape(-1)[0].item() if "alpha" in parts else None
        if alpha is None and "down" in parts:
            alpha = declared(key, parts["down"].shape[0])
        modules[name] = build(name, parts, alpha, metadata)
    if ignored:
        metadata = {**metadata, "finetune.ignored": ", ".join(ignored)}
    return Adapters(modules, metadata, _words(tensors, ignored))


def read(path: Path | str, module_names: Iterable[str] | None = None) -> tuple[dict[str, LoraModule], dict[str, str]]:
    """Read a file of plain low-rank pairs: canonical name to pair (tensors as stored), and the file's metadata.

    Args:
        module_names: as for `read_adapters`.

    Raises:
        Problem: for other kinds of adapters and unknown layouts.
    """
    adapters = read_adapters(path, module_names)
    for name, module in adapters.modules.items():
        if not isinstance(module, LoraModule):
            raise Problem(f"{Path(path).name} holds {module.kind} (module {name!r}), not plain LoRA pairs.",
                          "This step works on low-rank pairs.",
                          "`finetune merge FILE --rank R --output lora.safetensors` approximates it by plain pairs.")
    return dict(adapters.modules), adapters.metadata  # type: ignore[arg-type]


def build(name: str, parts: Mapping[str, Tensor], alpha: float | None, metadata: Mapping[str, str]) -> Adapter:
    """The adapter a module's parts make.

    Args:
        alpha: of the file, else as declared; None where nothing says one.

    Raises:
        Problem: shapes that do not belong together.
    """
    kind = kind_of(parts)
    if kind in ("LoRA", "DoRA"):
        pair = LoraModule(_with_core(parts), parts["up"], float(alpha or 0))
        check_pair(name, pair)
        if kind == "LoRA":
            return pair
        of_base = metadata.get("finetune.dora_norm") == "base" and "magnitude" in parts  # PEFT's are of the merged weight
        return DoraModule(pair, _magnitude(parts, pair), "base" if of_base else "merged")
    if kind in ("LoHa", "LoKr"):
        prefix = "hada_" if kind == "LoHa" else "lokr_"
        tensors = {part.removeprefix(prefix): value for part, value in parts.items() if part.startswith(prefix)}
        return (LohaModule if kind == "LoHa" else LokrModule)(tensors, alpha)
    if kind == "OFT":
        blocks = parts["oft_blocks"]
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            raise Problem(f"Module {name!r} has OFT blocks of shape {list(blocks.shape)}.",
                          "Square blocks (n, b, b) are read; butterfly OFT (BOFT) is not.",
                          "Merge it into a checkpoint with the program that made it.")
        # kohya and LyCORIS: alpha times the number of outputs bounds the norm of Q; 0 or no alpha is no bound
        bound = alpha * blocks.shape[0] * blocks.shape[1] if alpha else None
        return OftModule(blocks, bound, parts.get("rescale"))
    if kind == "full difference":
        return FullModule(parts["diff"], parts.get("diff_b"))
    raise Problem(f"Module {name!r} is PEFT's OFT, whose settings are not in this file.", "They are in adapter_config.json beside it.",
                  "Name the folder, not the file.")


def _with_core(parts: Mapping[str, Tensor]) -> Tensor:
    """`down`, with LoCon's middle weight (r, r, kh, kw) multiplied in: the pair then is a plain one."""
    if "mid" not in parts:
        return parts["down"]
    return torch.einsum("rskl,si->rikl", parts["mid"].float(), parts["down"].float().flatten(1))


def _magnitude(parts: Mapping[str, Tensor], pair: LoraModule) -> Tensor:
    """A magnitude as (O, 1, ...) or (1, I, ...). PEFT's is always of outputs, as a bare row or (1, O, 1, 1)."""
    ones = [1] * (pair.down.ndim - 2)
    if "row_magnitude" in parts:
        return parts["row_magnitude"].reshape(-1, 1, *ones)
    value = parts["magnitude"]
    return value.reshape(-1, 1, *ones) if value.shape[0] == pair.up.shape[0] else value.reshape(1, -1, *ones)


def check_pair(name: str, module: LoraModule) -> None:
    """Refuse a pair whose halves do not fit together, or whose alpha is 0.

    Raises:
        Problem: either.
    """
    down, up = tuple(module.down.shape), tuple(module.up.shape)
    if len(down) not in (2, 4) or len(up) != len(down) or up[1] != down[0] or up[2:] not in ((), (1, 1)):
        raise Problem(f"LoRA module {name!r} has down {list(down)} and up {list(up)}, which do not fit together.",
                      "down is (rank, in, ...) and up (out, rank, ...).", "The file is damaged or of another adapter type.")
    if module.alpha == 0:
        raise Problem(f"LoRA module {name!r} has alpha 0.", "Some programs read 0 as 'switched off', others as 'equal to the rank'.",
                      "Leave the module out, or give a positive alpha.")


def _words(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Learned words by token: `<token>` itself, or NAME of `bundle_emb.NAME.string_to_param.*`."""
    words = {}
    for key in keys:
        name = key.removeprefix("bundle_emb.")
        token = name if name == key else name.removesuffix(".string_to_param.*")
        words[token] = tensors[key] if tensors[key].ndim > 1 else tensors[key][None]
    return words
