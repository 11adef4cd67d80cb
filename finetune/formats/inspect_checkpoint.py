"""Findings about whole models in one file, from names, shapes and dtypes alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.formats import readers
from finetune.formats.families import SD2, SD2_V, SDXL, Family, family_of_width
from finetune.formats.header import Header
from finetune.formats.inspection import Report, convert
from finetune.formats.readers import CARE, NO

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
PARTS = {"UNet": (UNET_PREFIX,), "VAE": ("first_stage_model.",), "text encoder": TEXT_PREFIXES, "EMA copy": ("model_ema.",)}
CHANNELS = {4: "", 5: "depth", 8: "instruct-pix2pix", 9: "inpainting"}
_SD2_KEY = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
_SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"


def is_checkpoint(names: Mapping[str, Any]) -> bool:
    """Whether it is a whole model in the original single-file layout."""
    return any(name.startswith(UNET_PREFIX) for name in names)


def checkpoint_family(header: Header) -> Family | None:
    """Family of a single-file checkpoint by the keys the readers themselves go by; None without cross-attention."""
    if _SDXL_KEY in header.tensors:
        return SDXL
    for name, info in header.tensors.items():
        sd2 = name == _SD2_KEY and info.shape[-1] == SD2.context_width
        if sd2 or name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight"):
            return family_of_width(info.shape[1], header.metadata)
    return None


def describe_checkpoint(report: Report, header: Header) -> None:
    """Fill in a report on a single-file checkpoint.

    Args:
        header: of a safetensors file, or the same facts of a `.ckpt`.
    """
    report.kind = "single-file-checkpoint"
    report.family = checkpoint_family(header)
    for part, prefixes in PARTS.items():
        inside = [info for name, info in header.tensors.items() if name.startswith(prefixes)]
        if inside:
            report.modules[part] = sum(info.parameters for info in inside)
            report.part_bytes[part] = sum(info.end - info.start for info in inside)
    first = header.tensors.get(UNET_PREFIX + "input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None else 4
    variant = CHANNELS.get(channels, f"{channels} input channels")
    report.layout = "original names" + (f", {variant} model" if variant else "")
    found = readers.checkpoint(report.path.name)
    _lacking(report, header, found)
    _variant(report, variant, found)
    _prediction(report, header)
    if "EMA copy" in report.modules:
        report.warnings.append("It carries an EMA copy that no reader uses by default.")
        report.remedies.append(convert(report.path, "single-file", f"{report.path.stem}-small.safetensors", "without the EMA copy, half as large"))
    if any("transformer.encoder.layers" in name for name in header.tensors if name.startswith(TEXT_PREFIXES)):
        report.warnings.append("Its text encoder lacks the `text_model.` level: diffusers says that the encoder is missing.")
        found["diffusers"] = (NO, "refuses it: finds no text encoder")
        report.remedies.append(convert(report.path, "single-file", f"{report.path.stem}-fixed.safetensors", "with the level put back"))
    report.readers = readers.table(found)


def _lacking(report: Report, header: Header, found: dict[str, readers.Verdict]) -> None:
    """Parts that are not there."""
    for part in ("VAE", "text encoder"):
        if part not in report.modules:
            report.warnings.append(f"It has no {part}: diffusers and finetune refuse it, ComfyUI leaves those outputs out.")
            found["diffusers"] = found["finetune"] = (NO, f"refuses it: no {part}")
            found["AUTOMATIC1111"] = found["Forge"] = (CARE, f"wants UNet, VAE and text encoder in one file; no {part}")
            found["ComfyUI"] = (CARE, f"without the outputs of the {part}")


def _variant(report: Report, variant: str, found: dict[str, readers.Verdict]) -> None:
    """Inpainting, depth and other models with more input channels."""
    if not variant:
        return
    if variant in ("inpainting", "depth"):
        needs = "--init-image and --mask" if variant == "inpainting" else "--depth"
        if found["finetune"][0] == "yes":
            found["finetune"] = (readers.YES, f"generate --model {report.path.name} {needs}; it cannot be trained on")
        report.warnings.append(f"It is {'an inpainting' if variant == 'inpainting' else 'a depth'} model: LoRAs of plain models fit it, "
                               "but it makes pictures only where a program offers that input.")
    else:
        found["finetune"] = (NO, f"knows no {variant} models")
        report.warnings.append(f"Its UNet takes {variant}: it is no ordinary model.")
    if variant == "depth":
        found["AUTOMATIC1111"] = found["Forge"] = found["ComfyUI"] = (CARE, "a depth model of SD 2; not tried")
    found["kohya"] = (NO, "trains and draws plain models only; not tried") if variant != "inpainting" else found["kohya"]


def _prediction(report: Report, header: Header) -> None:
    """SD 2 says nowhere in its tensors whether it predicts noise or v."""
    stated = header.metadata.get("finetune.prediction_type") or header.metadata.get("modelspec.prediction_type")
    beside = report.path.with_suffix(".yaml").is_file()
    if {"v_pred", "ztsnr"} & set(header.tensors):
        report.settings["marks"] = ", ".join(name for name in ("v_pred", "ztsnr") if name in header.tensors)
    if report.family not in (SD2, SD2_V):
        return
    if stated and stated.startswith("v"):
        report.family = SD2_V
        if not beside:
            report.warnings.append(f"It predicts v, and no {report.path.stem}.yaml lies beside it: A1111 and Forge then guess; diffusers goes by config= alone.")
    elif not stated:
        report.warnings.append("Nothing in an SD 2 file says epsilon or v: A1111 and Forge go by a .yaml of the same name"
                               + (", which is there." if beside else ", which is not there, or guess; ComfyUI guesses; diffusers goes by config= alone."))
