"""What web UIs compute, written again from shared documentation: small, slow, float64, no code of ours and none of theirs.

A1111: attention brackets, chunks of 75, emphasis "Original", LoRA tags, chained hypernetworks.
ComfyUI: hypernetworks as a list of attention patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,  # Hardswish under the name swish
}


def attention(text: str) -> list[tuple[str, float]]:
    """Weight of every letter that is left, by walking the text letter by letter. Knows no BREAK."""
    letters: list[tuple[str, float]] = []
    stack: list[tuple[str, int]] = []

    def close(kind: str, factor: float) -> None:
        place = max(number for number, (opened, _) in enumerate(stack) if opened == kind)
        start = stack.pop(place)[1]
        letters[start:] = [(letter, weight * factor) for letter, weight in letters[start:]]

    place = 0
    while place < len(text):
        sign, rest = text[place], text[place + 1:]
        open_kinds = [kind for kind, _ in stack]
        if sign == "\\":
            if rest[:1] in set("()[]\\") and rest:
                letters.append((rest[0], 1.0))
                place += 1
        elif sign in "([":
            stack.append((sign, len(letters)))
        elif sign == ":" and "(" in open_kinds and ")" in rest and _plain_number(rest[:rest.index(")")]):
            close("(", float(rest[:rest.index(")")]))
            place += 1 + rest.index(")")
        elif sign == ")" and "(" in open_kinds:
            close("(", 1.1)
        elif sign == "]" and "[" in open_kinds:
            close("[", 1 / 1.1)
        else:
            letters.append((sign, 1.0))
        place += 1
    for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):  # what was never closed reaches to the end
        for opened, start in stack:
            if opened == kind:
                letters[start:] = [(letter, weight * factor) for letter, weight in letters[start:]]
    return letters


def _plain_number(text: str) -> bool:
    digits = text.strip().removeprefix("-") if text.strip().startswith("-") else text.strip().removeprefix("+")
    return digits.count(".") <= 1 and digits.replace(".", "").isdigit()


def chunks(units: Sequence[tuple[int, ...] | None], comma: int, room: int = 75, reach: int = 20) -> list[list[int]]:
    """Lines of at most `room` tokens. A unit is one token, or the tokens of an embedding that stay together; None is BREAK.

    A full line gives up what follows its last comma if that comma is among its last `reach` tokens and what comes next
    is no comma; commas count only from the second place of a line that a comma itself began.
    """
    lines: list[list[int]] = []
    place, carried = 0, []
    while True:
        line, commas = list(carried), []
        carried = []
        while place < len(units) and units[place] is not None and len(line) + len(units[place]) <= room:
            if units[place] == (comma,) and line:
                commas.append(len(line))
            line += units[place]
            place += 1
        ended = place == len(units)
        if not ended and units[place] is not None and len(line) == room and units[place] != (comma,) and commas and room - commas[-1] <= reach:
            line, carried = line[:commas[-1] + 1], line[commas[-1] + 1:]
        if not ended and units[place] is None:
            place += 1
        if line or not ended or not lines:
            lines.append(line)
        if ended:
            return lines


def emphasis(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One chunk (L, D) with weights (L,): multiplied, then scaled back to its old mean."""
    wide = states.astype(np.float64)
    scaled = wide * weights[:, None]
    return scaled * (wide.mean() / scaled.mean())


def mlp(state: dict[str, Any], activation: str, activate_output: bool, x: np.ndarray) -> np.ndarray:
    """One half of a hypernetwork without layer norm: its Linear layers in numeric order."""
    numbers = sorted({int(key.split(".")[1]) for key in state})
    for number in numbers:
        x = x @ np.asarray(state[f"linear.{number}.weight"], dtype=np.float64).T + np.asarray(state[f"linear.{number}.bias"], dtype=np.float64)
        if number != numbers[-1] or activate_output:
            x = ACTIVATIONS[activation](x)
    return x


def chained(context: np.ndarray, files: list[tuple[dict[Any, Any], float]]) -> tuple[np.ndarray, np.ndarray]:
    """A1111: the contexts that reach to_k and to_v. Each file's k context is the next one's input, and so for v."""
    k = v = context.astype(np.float64)
    for content, multiplier in files:
        pair = content.get(context.shape[-1])
        if pair is not None:
            settings = content["activation_func"] or "linear", content.get("activate_output", True)
            k, v = k + multiplier * mlp(pair[0], *settings, k), v + multiplier * mlp(pair[1], *settings, v)
    return k, v


def patched(k: np.ndarray, v: np.ndarray, files: list[tuple[dict[Any, Any], float]]) -> tuple[np.ndarray, np.ndarray]:
    """ComfyUI: each hypernetwork is a patch on (q, k, v) before the projections, called in the order they were added."""
    patches = [lambda q, k, v, pair=content[k.shape[-1]], act=content["activation_func"], out=content["activate_output"], s=strength:
               (q, k + mlp(pair[0], act, out, k) * s, v + mlp(pair[1], act, out, v) * s)
               for content, strength in files if k.shape[-1] in content]
    q = np.zeros(1)
    for patch in patches:
        q, k, v = patch(q, k, v)
    return k, v


def lora(weight: np.ndarray, pieces: list[tuple[np.ndarray, np.ndarray, float, float, int | None]]) -> np.ndarray:
    """A1111: W + sum of multiplier (alpha / rank) up down over (up, down, alpha, multiplier, dyn); dyn cuts the inner width only."""
    merged = weight.astype(np.float64)
    for up, down, alpha, multiplier, dyn in pieces:
        merged = merged + multiplier * alpha / down.shape[0] * (up[:, :dyn].astype(np.float64) @ down[:dyn].astype(np.float64))
    return merged
