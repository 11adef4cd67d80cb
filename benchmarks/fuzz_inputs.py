"""What benchmarks/fuzz.py feeds to readers: files of every kind, the ways they are damaged, and texts of a grammar's own signs."""

from __future__ import annotations

import copy
import io
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NUMBERS = [struct.pack(kind, value) for kind, values in (
    ("<B", (0, 0x7F, 0x80, 0xFF)), ("<H", (0, 0x7FFF, 0xFFFF)), ("<I", (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)), (">I", (1, 0x7FFFFFFF)),
    ("<Q", (0, 2**31, 2**40, 2**63 - 1, 2**64 - 1))) for value in values]


def mutated(whole: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """A file with changes made one after another, at places counted modulo its length."""
    content = bytearray(whole)
    for kind, place, new in changes:
        start = place % (len(content) + 1)
        if kind == "overwrite":
            content[start:start + len(new)] = new
        elif kind == "insert":
            content[start:start] = new
        elif kind == "delete":
            del content[start:start + 1 + len(new) ** 3]
        elif kind == "double":
            content[start:start] = content[start:start + 64]
        else:
            del content[start:]
    return bytes(content)


def damaged(files: list[bytes]) -> Any:
    """Strategy: one of the files with up to six changes, or bytes that were never a file."""
    change = st.tuples(st.sampled_from(["overwrite"] * 4 + ["insert", "delete", "double", "cut"]), st.integers(0, 2**16),
                       st.sampled_from(NUMBERS) | st.binary(max_size=8))
    return st.builds(mutated, st.sampled_from(files), st.lists(change, max_size=6)) | st.binary(max_size=64)


def lying(files: list[bytes]) -> Any:
    """Strategy: safetensors files whose header is still JSON and says something else than the data."""
    odd = st.sampled_from([0, 1, -1, 2**31, 2**63, 2**70, 1.5, None, True, "F32", "", [], {}, [0], [2, 2], [2**40, 2**40], [0, 0], [0, 2**40], "\ud800"])

    def told(whole: bytes, edits: list[tuple[int, str, Any]], extra: bytes) -> bytes:
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8:8 + length])
        for place, key, value in edits:
            name = sorted(header)[place % len(header)]
            told = header.get("__metadata__", {})
            inner = sorted(entry for entry in told if isinstance(told[entry], str) and told[entry].startswith("{")) if isinstance(told, dict) else []
            if key == "inner" and inner:
                known = json.loads(told[inner[0]])
                told[inner[0]] = json.dumps(known | {sorted(known)[place % len(known)]: copy.deepcopy(value)} if known else value)
            elif isinstance(header[name], dict) and key:
                header[name][key] = copy.deepcopy(value)
            else:
                header[name] = copy.deepcopy(value)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length:] + extra

    edit = st.tuples(st.integers(0, 99), st.sampled_from(["dtype", "shape", "data_offsets", "format", "inner", ""]), odd)
    return st.builds(told, st.sampled_from(files), st.lists(edit, max_size=3), st.sampled_from([b"", b"\0"]))


def texts(words: list[str], most: int = 16) -> Any:
    """Strategy: texts of a grammar's own pieces, and of any signs."""
    piece = st.sampled_from(words) | st.text(max_size=4) | st.builds(lambda word, count: word * count, st.sampled_from(words), st.sampled_from([2, 50, 1000]))
    return st.lists(piece, max_size=most).map("".join)


def example_files(folder: Path) -> dict[str, list[bytes]]:
    """Small files of every kind that is read: safetensors, pickles, pictures."""
    import torch
    from PIL import Image, ImageCms

    from finetune.formats import embedding, hypernetwork, lora
    from finetune.formats.hypernetwork_file import HypernetworkFile
    from finetune.formats.lora_kinds import LoraModule

    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    pair = {name: LoraModule(torch.ones(2, 4), torch.ones(4, 2), 2.0)}
    lora.write_kohya(folder / "a.safetensors", pair, {"finetune.trigger": "sks"}, torch.float16)
    lora.write_peft(folder / "b.safetensors", pair, {}, torch.float32)
    embedding.write_safetensors(folder / "word.safetensors", torch.ones(2, 8), {"finetune.trigger": "<w>"})
    embedding.write_webui(folder / "word.pt", torch.ones(2, 8), "word", 3, "base", "0123456789")
    embedding.write_diffusers(folder / "learned_embeds.safetensors", torch.ones(1, 8), "<w>", {})
    states = {(8, role): {key: torch.ones(shape) for key, shape in (("linear.0.weight", (16, 8)), ("linear.0.bias", (16,)),
                                                                   ("linear.1.weight", (8, 16)), ("linear.1.bias", (8,)))} for role in ("key", "value")}
    content = HypernetworkFile(states, [1, 2, 1], "linear", activate_output=False, name="net", step=3)
    hypernetwork.write_webui(folder / "net.pt", content)
    hypernetwork.write_safetensors(folder / "net.safetensors", content, {"finetune.trigger": "sks"})
    torch.save({"string_to_param": {"*": torch.ones(1, 8)}, "name": "zip"}, folder / "zip.pt")
    torch.save({"<w>": torch.ones(8)}, folder / "bin.bin")
    picture = Image.effect_mandelbrot((9, 7), (-2, -1, 1, 1), 20)
    pictures = []
    for kind, mode, more in (("PNG", "RGB", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "I;16", {}), ("PNG", "LA", {}), ("JPEG", "RGB", {"exif": _turned()}),
                             ("JPEG", "CMYK", {}), ("GIF", "P", {"save_all": True, "append_images": [picture]}), ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
                             ("WEBP", "RGB", {}), ("PNG", "RGB", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()}), ("BMP", "RGB", {}), ("ICO", "RGBA", {"sizes": [(9, 7)]}), ("TGA", "RGB", {}), ("PPM", "RGB", {}),
                             ("DDS", "RGB", {}), ("PCX", "RGB", {}), ("SGI", "RGB", {}), ("JPEG2000", "RGB", {}), ("AVIF", "RGB", {})):
        with suppress(KeyError, OSError, ValueError):  # a Pillow that cannot write this kind
            target = io.BytesIO()
            picture.convert("L").convert(mode).save(target, kind, **more)
            pictures.append(target.getvalue())
    return {"safetensors": [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))],
            "pt": [path.read_bytes() for path in sorted(folder.glob("*.pt")) + sorted(folder.glob("*.bin"))], "pictures": pictures}


def _turned() -> Any:
    """EXIF that says the picture lies on its side."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
