"""What `finetune merge`, `extract` and `resize` share: reading LoRAs by path, cutting their ranks, saying what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from finetune.errors import Problem

if TYPE_CHECKING:
    from finetune.formats.lora_kinds import LoraModule
    from finetune.formats.lora_math import Spectrum
    from finetune.formats.lora_read import Adapters

DTYPES = ("fp16", "bf16", "fp32")
KEPT = ("finetune.trigger", "finetune.class_noun", "finetune.base", "finetune.base_hash", "finetune.prediction_type", "finetune.resolution",
        "finetune.licence", "ss_base_model_version", "ss_sd_model_name", "ss_v2")  # of a source's metadata, true of what is made from it too


@dataclass(frozen=True)
class Row:
    """One module before and after: squared norms.

    Attributes:
        energy: of the change wanted.
        lost: of what the written pair leaves out.
    """

    name: str
    energy: float
    lost: float
    rank: int

    @property
    def kept(self) -> float:
        """Share of the energy kept, 1 for a module without any."""
        return share(self.energy, self.lost)


def share(energy: float, lost: float) -> float:
    """What is kept of an energy, between 0 and 1."""
    return 1.0 if energy == 0 else max(0.0, 1 - lost / energy)


def with_strength(word: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`; a colon that no number follows belongs to the name."""
    front, colon, back = word.rpartition(":")
    if colon and not Path(word).expanduser().exists():
        try:
            return Path(front).expanduser(), float(back)
        except ValueError:
            pass
    return Path(word).expanduser(), 1.0


def lora_at(path: Path) -> Path:
    """The LoRA file, or PEFT folder, at a path: a file, an artifact's folder or a run's.

    Raises:
        Problem: there is none.
    """
    from finetune.methods import get

    if not path.exists():
        raise Problem(f"There is no LoRA at {path}.", "", "Name a .safetensors file, the `artifact` folder of a run, or the run.")
    place = path / "artifact" if (path / "artifact").is_dir() else path
    found = get("lora").find(place)
    if found is None:
        raise Problem(f"{path} holds no LoRA.", "It has no keys of a LoRA layout.", f"`finetune inspect {path}` says what it is.")
    return found


def load_base(name: str) -> Any:
    """A base on the CPU in float32."""
    from finetune.cli import quiet
    from finetune.model import load

    quiet.libraries()
    return load(name)


def open_lora(path: Path, base: Any = None) -> Adapters:
    """Read a LoRA of any kind; a base resolves names and numbers that only the model tells."""
    from finetune.formats.lora_positions import places_of
    from finetune.formats.lora_read import read_adapters

    if base is None:
        return read_adapters(lora_at(path))
    return read_adapters(lora_at(path), places={part: places_of(network) for part, network in base.modules().items()})


def weights_of(base: Any) -> dict[str, Any]:
    """Weights of all linear and convolution layers of a base by canonical name."""
    from finetune.formats.lora_names import canonical
    from finetune.formats.lora_positions import places_of

    networks = {part: network for part, network in base.modules().items() if part != "vae"}
    return {canonical(f"{part}.{place.name}"): network.get_submodule(place.name).weight.data
            for part, network in networks.items() for place in places_of(network)}


def pairs(adapters: Adapters, base: Any, path: Path) -> dict[str, tuple[LoraModule | None, Any]]:
    """Each module as a plain pair, or, where it is of another kind, as its whole difference: (pair, None) or (None, difference).

    Raises:
        Problem: another kind and no base, or a base without the module.
    """
    from finetune.formats.lora import full
    from finetune.formats.lora_kinds import LoraModule

    plain = {name: module for name, module in adapters.modules.items() if isinstance(module, LoraModule)}
    others = {name: module for name, module in adapters.modules.items() if name not in plain}
    if others and base is None:
        raise Problem(f"{path} holds {', '.join(kind for kind in adapters.kinds if kind != 'LoRA')}, which is no low-rank pair.",
                      "Its whole difference has to be computed with the weights of its base.", "Add --base MODEL and --rank R.")
    found: dict[str, tuple[LoraModule | None, Any]] = {name: (module, None) for name, module in plain.items()}
    if others:
        found |= {name: (None, module.diff) for name, module in full(others, weights_of(base)).items()}
    return found


def cut(name: str, spectrum: Spectrum, rank: int, clamp: float | None = None) -> tuple[LoraModule, Row]:
    """The best pair of a rank and what it leaves out."""
    from finetune.formats import lora_math

    pair = lora_math.truncate(spectrum, rank, clamp)
    lost = lora_math.error(spectrum, pair) if clamp is not None and clamp < 1 else spectrum.lost(rank)
    return pair, Row(name, spectrum.energy, lost, min(rank, len(spectrum.values)))


def tell(console: Console, rows: Iterable[Row], verbose: bool = False) -> None:
    """Print the energy kept: of each part, of the module that lost most, and with `verbose` of each."""
    rows = list(rows)
    table = Table.grid(padding=(0, 2))
    for part in sorted({row.name.partition(".")[0] for row in rows}, reverse=True):
        mine = [row for row in rows if row.name.startswith(f"{part}.")]
        table.add_row(part, f"{len(mine)} modules", f"keeps {share(sum(row.energy for row in mine), sum(row.lost for row in mine)):.2%} of the energy")
    console.print(table)
    worst = min(rows, key=lambda row: row.kept)
    console.print(f"largest loss: {worst.name} keeps {worst.kept:.2%}", soft_wrap=True)
    if verbose:
        for row in rows:
            console.print(f"  {row.kept:8.2%}  rank {row.rank:3d}  {row.name}", soft_wrap=True, highlight=False)


def write(path: Path, modules: Mapping[str, Any], metadata: Mapping[str, str], dtype: str, console: Console) -> None:
    """Write kohya's layout and say what was written.

    Raises:
        Problem: the name is not that of a safetensors file.
    """
    import torch

    from finetune.formats.lora import write_kohya

    if path.suffix != ".safetensors":
        raise Problem(f"--output {path} does not end in .safetensors.", "The LoRA is written as one file.", f"Use --output {path.with_suffix('.safetensors')}.")
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_kohya(path, modules, metadata, kinds[dtype])
    rank = max(module.rank for module in modules.values())
    console.print(f"{path}: {len(modules)} modules, rank {rank}, {path.stat().st_size:,} bytes", soft_wrap=True)
