"""Point 6 of the acceptance list: a single-file checkpoint has exactly the tensors its own structure implies, with their shapes. Header only."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.errors import Problem
from finetune.formats import ldm, ldm_names
from finetune.formats.header import Header
from finetune.formats.ldm_shapes import configs_of, shapes_of
from finetune.formats.stream import Lazy

# UNet widths and text width of the published models, by layout: a checkpoint of such a text width must be whole.
PUBLISHED = {768: [320, 640, 1280, 1280], 1024: [320, 640, 1280, 1280], 2048: [320, 640, 1280]}
OPTIONAL = ("v_pred", "ztsnr")


def findings(header: Header) -> Iterator[str]:
    """What is wrong with the keys and shapes, in sentences."""
    if header.metadata.get("format") != "pt":
        yield "The header does not say format=pt."
    tensors = {key: Lazy(info.dtype, info.shape, _never) for key, info in header.tensors.items()}
    doubtful = [key for key in tensors if key.startswith("model_ema.") or "." not in key and key not in OPTIONAL]
    if doubtful:
        yield f"{len(doubtful)} tensors are read by nobody, such as {doubtful[0]}."
    try:
        found = ldm.of_single(tensors, "the file")
        shapes = {part: {name: entry.shape for name, entry in state.items()} for part, state in found.parts.items()}
        configs = configs_of(shapes)
    except (Problem, KeyError, IndexError, ValueError) as error:
        yield f"It is no whole checkpoint: {error}"
        return
    for part, wanted in shapes_of(configs).items():
        for name in sorted({**wanted, **shapes[part]}):
            if wanted.get(name) != shapes[part].get(name):
                yield f"{part}: {name} has shape {shapes[part].get(name, 'none')} where its structure asks for {wanted.get(name, 'none')}."
    width, channels = configs["unet"]["cross_attention_dim"], configs["unet"]["block_out_channels"]
    if width in PUBLISHED and channels != PUBLISHED[width]:
        yield f"Its text width is {width}, but its UNet's widths are {channels}, not {PUBLISHED[width]}."
    if found.extra and not any(key.startswith(ldm_names.OPEN_CLIP + "text_projection") for key in tensors):
        yield "SD 2's text encoder lacks text_projection."


def _never() -> None:
    raise AssertionError("a check of headers does not read weights")
