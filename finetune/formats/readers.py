"""Which program reads which kind of file, and how it is chosen there. docs/formats.md, "Who reads what"; docs/using/ says more. Torch-free.

"yes" is said of what a program takes without a word, "with care" of what it takes differently from what was meant, "no" of the
rest. What stands here about A1111, Forge, ComfyUI and kohya's scripts was read from their sources, or run with the rest
of the program replaced; nothing was tried in a live installation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROGRAMS = ("finetune", "diffusers", "AUTOMATIC1111", "Forge", "ComfyUI", "kohya")
YES, CARE, NO = "yes", "with care", "no"
Verdict = tuple[str, str]


@dataclass(frozen=True)
class Reader:
    """What one program makes of a file.

    Attributes:
        verdict: "yes", "with care" or "no".
        text: how the file is chosen there; or what happens instead.
    """

    program: str
    verdict: str
    text: str


def table(verdicts: Mapping[str, Verdict]) -> list[Reader]:
    """Readers in the order of PROGRAMS; every program must be spoken of."""
    return [Reader(program, *verdicts[program]) for program in PROGRAMS]


def kohya_lora(file: str, name: str) -> dict[str, Verdict]:
    """A LoRA in the layout of kohya's scripts, nothing wrong with it.

    Args:
        name: file stem or `ss_output_name`.
    """
    tag = f"models/Lora; <lora:{name}:1> in the prompt"
    return {
        "finetune": (YES, f"--artifact {file}"),
        "diffusers": (YES, f'pipe.load_lora_weights("{file}")'),
        "AUTOMATIC1111": (YES, tag),
        "Forge": (YES, tag),
        "ComfyUI": (YES, "models/loras; Load LoRA node"),
        "kohya": (YES, f"--network_module networks.lora --network_weights {file}"),
    }


def peft_lora(file: str) -> dict[str, Verdict]:
    """A LoRA in diffusers' own spellings."""
    return {
        "finetune": (YES, f"--artifact {file}"),
        "diffusers": (YES, f'pipe.load_lora_weights("{file}")'),
        "AUTOMATIC1111": (NO, "finds nothing in it"),
        "Forge": (NO, "refuses it: too many names it does not know"),
        "ComfyUI": (NO, "loses every attention module: 64 of 192 are found in SD 1's UNet"),
        "kohya": (NO, "finds no lora_down in it"),
    }


def lycoris(file: str, name: str, kinds: list[str], rows: bool = False) -> dict[str, Verdict]:
    """DoRA, LoHa, LoKr, OFT or whole differences under kohya's prefixes.

    Args:
        kinds: as finetune.formats.lora_keys names them.
        rows: whether DoRA's lengths are of outputs, as PEFT's are, not of inputs.
    """
    if "OFT of inputs" in kinds:
        return everyone_else((NO, "give finetune the folder with adapter_config.json, not the file"), (NO, "PEFT's OFT rotates inputs; read by PEFT alone"))
    found = kohya_lora(file, name)
    found["diffusers"] = (CARE, "leaves DoRA's lengths out") if set(kinds) <= {"DoRA", "LoRA"} else (NO, "refuses it")
    found["kohya"] = (CARE, "with LyCORIS' own module (--network_module lycoris.kohya); not tried")
    if "DoRA" in kinds and rows:
        found["AUTOMATIC1111"] = (NO, "noise: it takes the lengths for those of inputs")
        found["Forge"] = (CARE, "noise up to June 2025, as in A1111; newer forks read it")
    if "OFT" in kinds:
        found["ComfyUI"] = (CARE, "squares the strength; the same at 1")
    if kinds == ["full difference"]:
        found["kohya"] = (NO, "networks.lora passes over differences")
    return found


def numbered_lora(file: str) -> dict[str, Verdict]:
    """cloneofsimo's keys, which number a model's modules."""
    return everyone_else((CARE, f"with the base it belongs to: finetune convert {file} --base MODEL --to kohya --output NAME.safetensors"),
                         (NO, "does not know its numbered keys"))


def adapter_folder(folder: str) -> dict[str, Verdict]:
    """PEFT's own folder."""
    found = everyone_else((YES, f"--artifact {folder}, or the folder above it"), (NO, "does not read PEFT's folders"))
    return {**found, "diffusers": (CARE, "PeftModel.from_pretrained(pipe.unet, folder), for the one network it was made for; not tried")}


def embedding(file: str, stem: str, form: str, token: str | None) -> dict[str, Verdict]:
    """An embedding.

    Args:
        form: "table" (one tensor without a word), "token" (one tensor under its word), "dict" (A1111's .pt), "pair" (SDXL's).
        token: the word inside, or which the metadata state; None where nothing does.
    """
    typed = f"embeddings/; type {stem}"
    found = {
        "finetune": (YES, f"--artifact {file}"),
        "diffusers": (YES, f'pipe.load_textual_inversion("{file}"); type {token}'),
        "AUTOMATIC1111": (YES, typed),
        "Forge": (YES, typed),
        "ComfyUI": (YES, f"models/embeddings; type embedding:{stem}"),
        "kohya": (YES, f"--textual_inversion_embeddings {file}; type {stem}"),
    }
    if form == "table":
        found["diffusers"] = (CARE, f'pipe.load_textual_inversion("{file}", token="{token or stem}"); without token= the word is the key')
    if form == "pair":
        found["diffusers"] = (NO, "takes its two tensors one by one, each with its tokenizer and encoder")
    return found


def hypernetwork_pt(file: str, stem: str) -> dict[str, Verdict]:
    """A1111's `.pt`, nothing wrong with it."""
    return {
        "finetune": (YES, f"--artifact {file}"),
        "diffusers": (NO, "has no hypernetworks"),
        "AUTOMATIC1111": (YES, f"models/hypernetworks; <hypernet:{stem}:1> in the prompt"),
        "Forge": (NO, "loads it and applies nothing"),
        "ComfyUI": (YES, "models/hypernetworks; HypernetworkLoader node"),
        "kohya": (NO, "dropped hypernetworks"),
    }


def hypernetwork_safetensors(file: str) -> dict[str, Verdict]:
    """Our own file, for storage."""
    return {
        "finetune": (YES, f"--artifact {file}"),
        "diffusers": (NO, "has no hypernetworks"),
        "AUTOMATIC1111": (NO, "does not list it: it looks for .pt"),
        "Forge": (NO, "does not list it, and applies no hypernetwork"),
        "ComfyUI": (NO, "lists it and silently does nothing"),
        "kohya": (NO, "dropped hypernetworks"),
    }


def checkpoint(file: str) -> dict[str, Verdict]:
    """A whole single file, nothing wrong with it."""
    return {
        "finetune": (YES, f"--model {file}"),
        "diffusers": (YES, "from_single_file(file, config=FOLDER, local_files_only=True); without config= it asks the network"),
        "AUTOMATIC1111": (YES, "models/Stable-diffusion; checkpoint menu"),
        "Forge": (YES, "models/Stable-diffusion; checkpoint menu"),
        "ComfyUI": (YES, "models/checkpoints; Load Checkpoint node"),
        "kohya": (YES, f"--pretrained_model_name_or_path {file}"),
    }


def folder(path: str) -> dict[str, Verdict]:
    """A diffusers folder, nothing wrong with it."""
    return {
        "finetune": (YES, f"--model {path}"),
        "diffusers": (YES, f'DiffusionPipeline.from_pretrained("{path}")'),
        "AUTOMATIC1111": (NO, "wants a single file"),
        "Forge": (NO, "wants a single file"),
        "ComfyUI": (CARE, "deprecated DiffusersLoader node, not tried; a single file is the custom"),
        "kohya": (YES, f"--pretrained_model_name_or_path {path}"),
    }


def everyone_else(finetune: Verdict, others: Verdict) -> dict[str, Verdict]:
    """One verdict for finetune, one for all the others."""
    return {program: finetune if program == "finetune" else others for program in PROGRAMS}
