"""What a picture tells of how it was made: the web UI's `parameters`, our own JSON, or an embedding hidden in it. Torch-free.

Only text chunks are read, no pixel; `finetune generate --like` repeats such a picture.
"""

from __future__ import annotations

import json
import re
import shlex

from finetune.formats.inspection import Report
from finetune.formats.readers import NO, YES, Verdict, everyone_else, table

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OURS = "finetune" + ".settings"  # the text chunk's name, which is no module's
LONGEST = 2**20
_FIELD = re.compile(r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def describe_picture(report: Report) -> None:
    """Fill in a report on a picture."""
    from PIL import Image, UnidentifiedImageError

    report.kind = "picture"
    try:
        with Image.open(report.path) as picture:
            report.settings["pixels"] = f"{picture.width} x {picture.height}"
            told = {str(key): str(value)[:LONGEST] for key, value in picture.info.items() if isinstance(value, str)}
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        report.warnings.append(f"It cannot be read as a picture: {str(error).splitlines()[0]}.")
        return
    if "sd-ti-embedding" in told:
        report.layout = "with an embedding inside (A1111)"
        report.warnings.append("A1111 and Forge read the embedding inside; no other program does. Save it there as .pt to use it elsewhere.")
        report.readers = table({**everyone_else((NO, "reads .pt and .safetensors"), (NO, "reads .pt and .safetensors")),
                                "AUTOMATIC1111": (YES, "embeddings/; the word is the name inside"), "Forge": (YES, "embeddings/; the word is the name inside")})
    elif "parameters" in told or OURS in told:
        _generated(report, told)
    else:
        report.layout = "without a word of how it was made"


def _generated(report: Report, told: dict[str, str]) -> None:
    """Prompt, settings, and the networks used."""
    report.layout = "with its settings (finetune and web UI)" if OURS in told else "with its settings (web UI)"
    *lines, last = told.get("parameters", "").strip().split("\n")
    fields = {name.strip(): value.strip().strip('"') for name, value in _FIELD.findall(last)}
    if len(fields) < 3:  # the web UI's own rule: then the last line is prompt as well
        lines, fields = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    report.settings |= {name: text for name, text in (("prompt", prompt.strip()), ("negative", negative.strip())) if text}
    report.settings |= fields
    try:
        facts = json.loads(told.get(OURS, "null"))
    except (ValueError, RecursionError):
        facts = None
    if isinstance(facts, dict) and "sheet" in facts:
        report.layout = "contact sheet of many pictures (finetune)"
        return
    like: Verdict = (YES, f"finetune generate --like {report.path.name}")
    unread: Verdict = (NO, "does not read it")
    page = (YES, "PNG Info tab")
    report.readers = table({"finetune": like, "diffusers": unread, "AUTOMATIC1111": page, "Forge": page, "kohya": unread,
                            "ComfyUI": (NO, "reads its own workflow; the web UI's text not tried")})
    report.remedies.append(("draw it again", f"finetune generate --like {shlex.quote(str(report.path))} --output again/"))
