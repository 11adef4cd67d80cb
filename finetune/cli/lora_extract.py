"""`finetune extract TUNED --base BASE`: a LoRA from the difference of two models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track

from finetune import runs
from finetune.cli import lora_tools
from finetune.errors import Problem
from finetune.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

CONVOLUTIONS = ("resnets.", "downsamplers.", "upsamplers.")  # layers that only a LoRA with --conv-rank changes


class Settings(BaseModel):
    """What `finetune extract` takes."""

    model_config = ConfigDict(extra="forbid")

    tuned: str = setting(..., "the fine-tuned model: a DreamBooth artifact or run, a diffusers folder or a single .safetensors file", group="arguments")
    base: str = setting("toybox", "the model it was fine-tuned from", group="what")
    output: Path | None = setting(None, "the .safetensors to write", group="run")
    rank: int = setting(16, "rank of the attention layers and the text encoders", group="what", ge=1)
    conv_rank: int | None = setting(None, "also take the residual blocks, their 3x3 convolutions with this rank [default: left out]", group="what", ge=1)
    clamp: float = setting(1.0, "limit all factors to this quantile; kohya's scripts use .99; 1 is off and the best approximation", group="what", gt=0, le=1)
    dtype: Literal["fp32", "bf16", "fp16"] = setting("fp16", "number format of what is written", group="run")
    verbose: bool = setting(False, "say of each module what is kept", group="run")


def run(settings: Settings, console: Console) -> None:
    """Decompose each layer's difference and write; print the energy kept."""
    if settings.output is None:
        raise Problem("No --output was given.", "", "Add --output extracted.safetensors.")
    path = Path(settings.tuned).expanduser()
    tuned = lora_tools.load_base(str(path / "artifact") if (path / "artifact").is_dir() else settings.tuned)
    base = lora_tools.load_base(settings.base)
    from finetune.formats import lora_math

    ranks, modules, rows = targets(base, settings), {}, []
    outside = 0.0
    changed = list(differences(tuned, base, settings))
    for name, difference in track(changed, "decomposing", console=console, disable=not console.is_terminal, transient=True):
        if name not in ranks:
            outside += difference.double().square().sum().item()
            continue
        modules[name], row = lora_tools.cut(name, lora_math.of_matrix(difference), ranks[name], settings.clamp)
        rows.append(row)
    if not modules:
        raise Problem(f"{settings.tuned} and {settings.base} have the same weights in every layer a LoRA can change.",
                      "There is nothing to extract.", "Check the two names.")
    lora_tools.tell(console, rows, settings.verbose)
    energy = sum(row.energy for row in rows)
    console.print(f"of the whole difference between the models {lora_tools.share(energy + outside, outside + sum(row.lost for row in rows)):.2%} is kept; "
                  f"{outside / (energy + outside):.2%} lies in layers left out (norms, biases, embeddings"
                  + (", residual blocks; --conv-rank takes those)" if settings.conv_rank is None else ")"), soft_wrap=True)
    own = tuned.location.path / "finetune.json"
    facts = {key: value for key, value in (runs.read_json(own) if own.is_file() else {}).items() if key in lora_tools.KEPT}
    metadata = facts | {"finetune.base": base.known_as, "finetune.base_hash": base.hash, "finetune.prediction_type": base.prediction,
                "finetune.extracted": Path(settings.tuned).name}
    lora_tools.write(settings.output, modules, metadata, settings.dtype, console)


def targets(base: Any, settings: Settings) -> dict[str, int]:
    """Canonical names of the layers a LoRA changes, with the rank of each."""
    from finetune.formats.lora_names import canonical
    from finetune.formats.lora_positions import places_of

    found = {}
    for part, network in base.modules().items():
        for place in places_of(network) if part != "vae" else []:
            rank = settings.conv_rank if place.shape[2:] not in ((), (1, 1)) else settings.rank
            block = any(word in place.name for word in CONVOLUTIONS)
            inside = ".attentions." in f".{place.name}" if part == "unet" else ".layers." in place.name
            if rank is not None and (inside or block and settings.conv_rank is not None):
                found[canonical(f"{part}.{place.name}")] = rank
    return found


def differences(tuned: Any, base: Any, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """(name, tuned - base) of every tensor that differs: canonical module names for weights, tensor names for the rest.

    A tensor stored in half precision is compared with the base rounded alike: the rounding of weights is no training.

    Raises:
        Problem: the two are not of one architecture.
    """
    from finetune.formats.lora_names import canonical

    for part, network in base.modules().items():
        if part == "vae":
            continue
        before, after = dict(network.named_parameters()), dict(tuned.modules()[part].named_parameters()) if part in tuned.modules() else {}
        strange = [name for name in before.keys() | after.keys() if name not in before or name not in after or before[name].shape != after[name].shape]
        if strange:
            raise Problem(f"{settings.tuned} and {settings.base} are not of one architecture.", f"They differ in {part}.{min(strange)}.",
                          "Give the base that the model was fine-tuned from with --base.")
        for name, value in before.items():
            new, old = after[name].detach(), value.detach()
            for kind in (new.half(), new.bfloat16()):
                if (kind.float() == new).all():
                    old = old.to(kind.dtype).float()
                    break
            if not (new == old).all():
                yield canonical(f"{part}.{name.removesuffix('.weight')}") if name.endswith(".weight") else f"{part}.{name}", new - old
