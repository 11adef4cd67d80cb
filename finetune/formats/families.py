"""Which base model a tensor width belongs to, and the names other programs give that base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A base-model family.

    Attributes:
        key: "sd1", "sd2", "sd2-v", "sdxl" or "other".
        title: for people.
        context_width: width of the text states the UNet attends to.
        kohya: `ss_base_model_version`.
        modelspec: architecture id of modelspec 1.0.
    """

    key: str
    title: str
    context_width: int
    kohya: str
    modelspec: str


SD1 = Family("sd1", "Stable Diffusion 1.x", 768, "sd_v1", "stable-diffusion-v1")
SD2 = Family("sd2", "Stable Diffusion 2.x", 1024, "sd_v2", "stable-diffusion-v2-512")
SD2_V = Family("sd2-v", "Stable Diffusion 2.x (v-prediction)", 1024, "sd_v2_v", "stable-diffusion-v2-768-v")
SDXL = Family("sdxl", "Stable Diffusion XL", 2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
HIDDEN_WIDTHS = (320, 640, 1280)  # of every published Stable Diffusion UNet


def family_of_width(context_width: int | None, metadata: Mapping[str, str] | None = None) -> Family:
    """The family whose UNet attends to text states of this width.

    Args:
        context_width: None when a file does not show it.
        metadata: `finetune.prediction_type` or `ss_base_model_version` tells SD2's two kinds apart.

    Returns: a family; "other" for widths of no published model, such as toybox.
    """
    metadata = metadata or {}
    if context_width == SD2.context_width:
        is_v = metadata.get("finetune.prediction_type") == "v_prediction"
        return SD2_V if is_v or metadata.get("ss_base_model_version") == SD2_V.kohya else SD2
    for family in (SD1, SDXL):
        if context_width == family.context_width:
            return family
    if context_width is None:
        return Family("other", "unknown base", 0, "None", "latent-diffusion")
    title = f"another base (text width {context_width})"
    return Family("other", title, context_width, "None", f"latent-diffusion-{context_width}")


def modelspec(family: Family, adapter: str, title: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The modelspec 1.0 fields of an adapter file. No date unless given: equal runs should give equal files.

    Args:
        adapter: "lora", "textual-inversion" or "hypernetwork" (the last is our extension of the suffix rule).
        title: usually the file stem.
        metadata: the common `finetune.*` fields; licence, trigger, prediction type, resolution and date are taken over.
    """
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.modelspec}/{adapter}",
        "implementation": "diffusers",
        "title": title,
        "license": metadata.get("finetune.licence", ""),
        "trigger_phrase": metadata.get("finetune.trigger", ""),
        "resolution": metadata.get("finetune.resolution", ""),
        "date": metadata.get("finetune.date", ""),
        "prediction_type": {"v_prediction": "v", "epsilon": "epsilon"}.get(
            metadata.get("finetune.prediction_type", ""), ""
        ),
    }
    return {f"modelspec.{name}": value for name, value in fields.items() if value}


def modelspec_checkpoint(family: Family, channels: int, title: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The modelspec 1.0 fields of a whole checkpoint.

    Args:
        channels: of the UNet's input: 9 is an inpainting model, 5 a depth model.
        title, metadata: as in `modelspec`.
    """
    kind = {9: "/inpainting", 5: "/depth"}.get(channels, "")
    fields = {**modelspec(family, "checkpoint", title, metadata), "modelspec.architecture": family.modelspec + kind}
    if family is SDXL:  # kohya's custom for what uses the original names
        fields["modelspec.implementation"] = "https://github.com/Stability-AI/generative-models"
    elif family.key != "other":
        fields["modelspec.implementation"] = "https://github.com/CompVis/stable-diffusion"
    return fields
