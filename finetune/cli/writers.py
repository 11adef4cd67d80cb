"""The layouts of `finetune export` and `finetune convert`: one function for each kind of artifact, all through `finetune.formats`.

Every writer takes layout -> path and returns the files written and what could not be carried, in sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.cli.targets import DTYPES, Source, Written
from finetune.errors import Problem

def stem_of(source: Source, name: str | None) -> str:
    """The file stem: what was asked for, else the subject or trigger the artifact states, else its own name; safe letters only."""
    from finetune.formats.embedding import check_word, safe_word

    if name:
        check_word(name)
        return name
    if source.kind == "embedding":
        return safe_word(token_of(source))
    told = source.told.get("finetune.trigger")
    generic = source.path.stem in ("pytorch_lora_weights", "adapter_model", "artifact", "diffusion_pytorch_model") or source.path.is_dir()
    return safe_word(told if told and (generic or source.run) else source.path.stem if source.kind != "model" or source.path.suffix else source.path.name)


def token_of(source: Source) -> str:
    """The word an embedding answers to: what its file says, else its stem."""
    from finetune.formats import embedding

    found = embedding.read(source.path)
    return found.token or found.metadata.get("finetune.trigger") or source.told.get("finetune.trigger") or source.path.stem


def write(source: Source, places: Mapping[str, Path], dtype: str | None, *, base: str | None = None, like: Path | None = None) -> Written:
    """Write the artifact in every layout of `places`.

    Args:
        dtype: "fp16", "fp32", "bf16", or None for the numbers as they are.
        base: of a LoRA: the model it belongs to, where the layout needs it; of SD 2: the original checkpoint.
        like: of a single file written as a folder: a folder that describes it.
    """
    kinds = {"lora": _lora, "embedding": _embedding, "hypernetwork": _hypernetwork}
    if source.kind in kinds:
        return kinds[source.kind](source, places, dtype, base)
    from finetune.cli.model_writers import model

    return model(source, places, dtype, base, like)


def _lora(source: Source, places: Mapping[str, Path], dtype: str | None, base: str | None) -> Written:
    import torch

    from finetune.formats import lora, stream
    from finetune.formats.header import read_header

    done = Written()
    names, positions, weights = _of_base(base) if base else (None, None, {})
    path = _distribution_file(source.path) if set(places) == {"kohya"} else source.path
    found = lora.read_adapters(path, names, positions)
    modules = {name: lora.for_readers(module, weights.get(name)) for name, module in found.modules.items()}
    if dtype is None and path.is_file():
        kinds = [info.dtype for info in read_header(path).tensors.values() if info.dtype in DTYPES.values()]
        kind = stream.TORCH_DTYPES[kinds[0]]
    else:
        kind = stream.TORCH_DTYPES[DTYPES[dtype or "fp16"]]
    metadata = {**source.told, **found.metadata}
    if found.words:
        done.notes.append(f"The words bundled in the file are not carried: {', '.join(found.words)}.")
    for layout, path in places.items():
        (lora.write_kohya if layout == "kohya" else lora.write_peft)(path, modules, metadata, kind)
        done.files.append(path)
    if kind is torch.bfloat16:
        done.notes.append("bf16 keeps eight bits of each number; fp16 is the custom for LoRA files.")
    return done


def _distribution_file(path: Path) -> Path:
    """Of an artifact folder with PEFT's folders in it, the file beside them that other programs read, made with the base at hand."""
    return next((file for file in sorted(path.glob("*.safetensors"))), path) if path.is_dir() else path


def _of_base(name: str) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """A base's module names, their places in order, and its weights, by canonical name."""
    from finetune.formats.lora_names import canonical
    from finetune.formats.lora_positions import places_of
    from finetune.model import load

    base = load(name)
    layers = {f"{part}.{path}": layer for part, network in base.modules().items() if part != "vae" for path, layer in network.named_modules() if path}
    weights = {canonical(path): layer.weight.detach() for path, layer in layers.items() if getattr(layer, "weight", None) is not None}
    return list(layers), {part: places_of(network) for part, network in base.modules().items() if part != "vae"}, weights


def _embedding(source: Source, places: Mapping[str, Path], dtype: str | None, base: str | None) -> Written:
    from finetune.formats import embedding

    done = Written()
    if dtype == "bf16":
        done.notes.append("Embeddings are always written as fp32: they are small, and readers take them for that.")
    found = embedding.read(source.path)
    token = token_of(source)
    told = found.metadata
    names = {"step": "finetune.steps", "sd_checkpoint_name": "finetune.base", "sd_checkpoint": "finetune.base_hash"}
    metadata = {**source.told, "finetune.trigger": token, **{names.get(key, key): value for key, value in told.items() if "." in key or key in names}}
    for layout, path in places.items():
        if layout == "table":
            embedding.write_safetensors(path, found.vectors, metadata, found.second)
        elif layout == "dict" and found.second is None:
            steps = metadata.get("finetune.steps", "0")
            embedding.write_webui(path, found.vectors, path.stem, int(steps) if steps.isdigit() else 0, metadata.get("finetune.base"),
                                  metadata.get("finetune.base_hash", "")[:10] or None)
        elif layout == "dict":
            path = path.with_suffix(".safetensors")
            if "table" in places:
                continue
            embedding.write_safetensors(path, found.vectors, metadata, found.second)
            done.notes.append("The web UI's .pt has no place for SDXL's second table; its programs read this pair instead.")
        else:
            embedding.write_diffusers(path, found.vectors, token, metadata)
            if found.second is not None:
                second = path.with_name(f"{path.stem}_2{path.suffix}")
                embedding.write_diffusers(second, found.second, token, metadata)
                done.files.append(second)
                done.notes.append("diffusers takes one file for each of SDXL's encoders: load the _2 with text_encoder_2 and tokenizer_2.")
        done.files.append(path)
    return done


def _hypernetwork(source: Source, places: Mapping[str, Path], dtype: str | None, base: str | None) -> Written:
    from finetune.formats import hypernetwork, stream

    done = Written()
    found = hypernetwork.read(source.path)
    dropped = dropout_in(source.path)
    if dropped:
        done.notes.append(f"Dropout {dropped} is not carried: ComfyUI would leave it on while generating. Layers were renumbered without it.")
    if source.path.with_name(source.path.name + ".optim").is_file():
        done.notes.append(f"The optimizer state in {source.path.name}.optim is not carried.")
    if dtype:
        kind = stream.TORCH_DTYPES[DTYPES[dtype]]
        found = replace(found, networks={place: {key: value.to(kind) for key, value in state.items()} for place, state in found.networks.items()})
    for layout, path in places.items():
        content = replace(found, name=path.stem)
        if layout == "pairs":
            _refuse_queries(found)
            hypernetwork.write_webui(path, content)
        else:
            hypernetwork.write_safetensors(path, content, {**source.told, **found.metadata})
        done.files.append(path)
    return done


def _refuse_queries(found: Any) -> None:
    """Networks on the query, or on one of key and value alone, have no place in the web UI's file."""
    if found.transform != ["key", "value"]:
        raise Problem(f"This hypernetwork transforms {' and '.join(found.transform)} and cannot be written for the web UI.",
                      "The web UI's file holds one pair for each width, which it applies to key and value: a network trained for the query would act on another.",
                      "Train one with `finetune hypernetwork --transform key,value` (the default), or keep the .safetensors for finetune.")


def dropout_in(path: Path) -> list[float] | None:
    """The dropout a web UI's hypernetwork states; it lies between the layers and is never carried."""
    if path.suffix == ".safetensors":
        return None
    from finetune.formats.pickles import load_restricted

    told = load_restricted(path)
    shares = told.get("dropout_structure") or ([0.3] if told.get("use_dropout") else [])
    return list(shares) if any(share > 0 for share in shares) else None
