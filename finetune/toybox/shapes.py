"""The twelve things of the rendered world, each a short list of polygons in a box from -1 to 1, y pointing down.

A part names the role of its fill: `body` carries the look's pattern, `dark` and `light` are shades of the body colour,
and a triple is a fixed colour (eyes, wood, glass). A look may repaint a part by its name (a yellow pocket).
"""

from dataclasses import dataclass
from math import cos, pi, sin

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

WHITE, BLACK, GLASS, WOOD = (250, 250, 250), (28, 26, 32), (176, 214, 238), (122, 84, 52)


@dataclass(frozen=True)
class Part:
    """One filled outline; `hole` is cut out of it (handles), `lined` draws its contour in the drawing style."""

    name: str
    fill: str | RGB
    outline: tuple[tuple[float, float], ...]
    hole: tuple[tuple[float, float], ...] = ()
    lined: bool = True


def ellipse(x: float, y: float, rx: float, ry: float, corners: int = 28) -> Points:
    """Corners of an ellipse around (x, y)."""
    angles = [2 * pi * corner / corners for corner in range(corners)]
    return [(x + rx * cos(angle), y + ry * sin(angle)) for angle in angles]


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> Points:
    """Corners of a rectangle whose corners are rounded by `radius`."""
    if radius == 0.0:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    centres = [
        (right - radius, bottom - radius, 0.0),
        (left + radius, bottom - radius, pi / 2),
        (left + radius, top + radius, pi),
        (right - radius, top + radius, 3 * pi / 2),
    ]
    return [
        (x + radius * cos(start + step * pi / 10), y + radius * sin(start + step * pi / 10))
        for x, y, start in centres
        for step in range(6)
    ]


def ribbon(path: Points, width: float) -> Points:
    """Outline of a line of constant width through the points of `path` (tails, straps)."""
    left, right = [], []
    for index, (x, y) in enumerate(path):
        x0, y0 = path[max(index - 1, 0)]
        x1, y1 = path[min(index + 1, len(path) - 1)]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (y1 - y0) / length * width / 2, -(x1 - x0) / length * width / 2
        left.append((x + dx, y + dy))
        right.append((x - dx, y - dy))
    return left + right[::-1]


def _part(name: str, fill: str | RGB, outline: Points, hole: Points | None = None, lined: bool = True) -> Part:
    return Part(name, fill, tuple(outline), tuple(hole or ()), lined)


def _eye(x: float, y: float, radius: float) -> list[Part]:
    return [
        _part("eye", WHITE, ellipse(x, y, radius, radius, 16)),
        _part("pupil", BLACK, ellipse(x, y + 0.02, radius * 0.55, radius * 0.6, 12), lined=False),
    ]


def _mug() -> list[Part]:
    return [
        _part("handle", "dark", ellipse(0.50, 0.08, 0.46, 0.50), ellipse(0.50, 0.08, 0.25, 0.29)),
        _part("cup", "body", [(-0.78, -0.62), (0.50, -0.62), (0.42, 0.80), (0.24, 0.90), (-0.52, 0.90), (-0.70, 0.80)]),
        _part("rim", "light", ellipse(-0.14, -0.62, 0.64, 0.20)),
        _part("inside", (84, 54, 40), ellipse(-0.14, -0.60, 0.50, 0.12), lined=False),
    ]


def _ball() -> list[Part]:
    return [_part("ball", "body", ellipse(0.0, 0.06, 0.84, 0.84, 40))]


def _robot() -> list[Part]:
    return [
        _part("stalk", "dark", box(-0.05, -0.92, 0.05, -0.60)),
        _part("antenna", "light", ellipse(0.0, -0.88, 0.13, 0.12, 16)),
        _part("arm", "dark", box(-0.86, -0.08, -0.60, 0.48, 0.10)),
        _part("arm", "dark", box(0.60, -0.08, 0.86, 0.48, 0.10)),
        _part("leg", "dark", box(-0.42, 0.50, -0.10, 0.92, 0.05)),
        _part("leg", "dark", box(0.10, 0.50, 0.42, 0.92, 0.05)),
        _part("head", "body", box(-0.50, -0.74, 0.50, -0.14, 0.12)),
        _part("torso", "body", box(-0.58, -0.12, 0.58, 0.60, 0.10)),
        *_eye(-0.22, -0.48, 0.15),
        *_eye(0.22, -0.48, 0.15),
        _part("mouth", BLACK, box(-0.22, -0.29, 0.22, -0.21), lined=False),
    ]


def _cat() -> list[Part]:
    tail = [(0.30, 0.78), (0.62, 0.74), (0.80, 0.52), (0.78, 0.24), (0.66, 0.06), (0.70, -0.12), (0.84, -0.20)]
    return [
        _part("tail", "body", ribbon(tail, 0.20)),
        _part("ear", "body", [(-0.60, -0.92), (-0.62, -0.36), (-0.16, -0.60)]),
        _part("ear", "body", [(0.60, -0.92), (0.62, -0.36), (0.16, -0.60)]),
        _part("inner ear", (236, 150, 160), [(-0.53, -0.76), (-0.54, -0.50), (-0.32, -0.60)], lined=False),
        _part("inner ear", (236, 150, 160), [(0.53, -0.76), (0.54, -0.50), (0.32, -0.60)], lined=False),
        _part("body", "body", ellipse(0.0, 0.44, 0.50, 0.50)),
        _part("paw", "light", ellipse(-0.22, 0.86, 0.19, 0.11, 16)),
        _part("paw", "light", ellipse(0.22, 0.86, 0.19, 0.11, 16)),
        _part("head", "body", ellipse(0.0, -0.28, 0.62, 0.42)),
        *_eye(-0.25, -0.32, 0.14),
        *_eye(0.25, -0.32, 0.14),
        _part("nose", (226, 110, 124), [(-0.08, -0.14), (0.08, -0.14), (0.0, -0.04)], lined=False),
    ]


def _fish() -> list[Part]:
    return [
        _part("tail", "dark", [(0.42, 0.04), (0.96, -0.46), (0.84, 0.04), (0.96, 0.54)]),
        _part("fin", "dark", [(-0.34, -0.34), (-0.02, -0.80), (0.40, -0.62), (0.34, -0.24)]),
        _part("belly fin", "dark", [(-0.12, 0.40), (0.08, 0.76), (0.30, 0.66), (0.26, 0.34)]),
        _part("body", "body", ellipse(-0.16, 0.04, 0.76, 0.50, 36)),
        _part("side fin", "dark", [(-0.10, 0.02), (0.22, 0.12), (-0.06, 0.28)]),
        *_eye(-0.56, -0.08, 0.15),
        _part("mouth", BLACK, [(-0.90, 0.16), (-0.68, 0.20), (-0.70, 0.26), (-0.88, 0.24)], lined=False),
    ]


def _house() -> list[Part]:
    return [
        _part("chimney", "dark", box(0.38, -0.86, 0.60, -0.30)),
        _part("wall", "body", box(-0.68, -0.24, 0.68, 0.90)),
        _part("roof", "dark", [(0.0, -0.94), (0.92, -0.18), (-0.92, -0.18)]),
        _part("door", WOOD, box(-0.16, 0.36, 0.18, 0.90)),
        _part("window", (255, 236, 150), box(-0.56, -0.02, -0.24, 0.28)),
        _part("window", (255, 236, 150), box(0.26, -0.02, 0.58, 0.28)),
    ]


def _car() -> list[Part]:
    return [
        _part("cabin", "body", [(-0.56, -0.02), (-0.36, -0.52), (0.34, -0.52), (0.64, -0.02)]),
        _part("glass", GLASS, [(-0.42, -0.06), (-0.28, -0.40), (-0.05, -0.40), (-0.05, -0.06)]),
        _part("glass", GLASS, [(0.07, -0.06), (0.07, -0.40), (0.28, -0.40), (0.48, -0.06)]),
        _part("chassis", "body", box(-0.94, -0.08, 0.94, 0.50, 0.16)),
        _part("lamp", (255, 240, 150), ellipse(-0.86, 0.14, 0.09, 0.11, 12)),
        _part("wheel", BLACK, ellipse(-0.50, 0.50, 0.27, 0.27, 24)),
        _part("wheel", BLACK, ellipse(0.50, 0.50, 0.27, 0.27, 24)),
        _part("hub", (205, 205, 212), ellipse(-0.50, 0.50, 0.12, 0.12, 16), lined=False),
        _part("hub", (205, 205, 212), ellipse(0.50, 0.50, 0.12, 0.12, 16), lined=False),
    ]


def _tree() -> list[Part]:
    lobes = []
    for corner in range(60):  # a cloud of seven bulges
        angle = 2 * pi * corner / 60
        reach = 1.0 + 0.10 * cos(7 * angle)
        lobes.append((0.80 * reach * cos(angle), -0.26 + 0.62 * reach * sin(angle)))
    return [
        _part("trunk", WOOD, [(-0.13, 0.20), (0.13, 0.20), (0.17, 0.84), (0.30, 0.94), (-0.30, 0.94), (-0.17, 0.84)]),
        _part("crown", "body", lobes),
    ]


def _bottle() -> list[Part]:
    shoulder = [(-0.17, -0.62), (0.17, -0.62), (0.20, -0.40), (0.40, -0.16), (0.46, 0.04)]
    base = [(0.46, 0.84), (0.36, 0.94), (-0.36, 0.94), (-0.46, 0.84), (-0.46, 0.04), (-0.40, -0.16), (-0.20, -0.40)]
    return [
        _part("glass", "body", shoulder + base),
        _part("cap", "dark", box(-0.23, -0.92, 0.23, -0.60, 0.05)),
        _part("label", WHITE, box(-0.46, 0.28, 0.46, 0.50)),
    ]


def _backpack() -> list[Part]:
    return [
        _part("loop", "dark", ellipse(0.0, -0.76, 0.26, 0.20), ellipse(0.0, -0.74, 0.14, 0.09)),
        _part("strap", "dark", box(-0.90, -0.26, -0.52, 0.72, 0.16)),
        _part("strap", "dark", box(0.52, -0.26, 0.90, 0.72, 0.16)),
        _part("bag", "body", [(x, y) for x, y in box(-0.70, -0.74, 0.70, 0.92, 0.30)]),
        _part("flap", "dark", box(-0.70, -0.10, 0.70, 0.02), lined=False),
        _part("pocket", "light", box(-0.46, 0.22, 0.46, 0.78, 0.12)),
        _part("buckle", WHITE, box(-0.09, -0.16, 0.09, 0.12, 0.03)),
    ]


def _teapot() -> list[Part]:
    spout = [(-0.46, 0.42), (-0.98, -0.30), (-0.84, -0.40), (-0.68, -0.32), (-0.42, -0.04)]
    return [
        _part("handle", "dark", ellipse(0.62, 0.12, 0.36, 0.42), ellipse(0.62, 0.12, 0.20, 0.25)),
        _part("spout", "dark", spout),
        _part("pot", "body", ellipse(0.0, 0.26, 0.70, 0.62, 36)),
        _part("foot", "dark", box(-0.36, 0.80, 0.36, 0.92, 0.04)),
        _part("lid", "dark", ellipse(0.0, -0.30, 0.42, 0.16)),
        _part("knob", "light", ellipse(0.0, -0.54, 0.13, 0.13, 16)),
    ]


def _duck() -> list[Part]:
    back = [(-0.66, 0.30), (-0.60, 0.02), (-0.16, -0.16), (0.06, 0.10), (0.40, 0.10), (0.62, 0.02), (0.96, -0.26)]
    keel = [(0.92, 0.30), (0.76, 0.66), (0.40, 0.90), (-0.26, 0.90), (-0.56, 0.68)]
    return [
        _part("beak", (248, 150, 30), [(-0.62, -0.60), (-1.02, -0.42), (-0.98, -0.26), (-0.58, -0.22)]),
        _part("hull", "body", back + keel),
        _part("head", "body", ellipse(-0.30, -0.40, 0.43, 0.42)),
        _part("wing", "dark", [(-0.10, 0.36), (0.34, 0.28), (0.70, 0.20), (0.58, 0.54), (0.22, 0.66), (-0.04, 0.56)]),
        *_eye(-0.42, -0.48, 0.13),
    ]


NOUNS: dict[str, list[Part]] = {
    "mug": _mug(),
    "ball": _ball(),
    "robot": _robot(),
    "cat": _cat(),
    "fish": _fish(),
    "house": _house(),
    "car": _car(),
    "tree": _tree(),
    "bottle": _bottle(),
    "backpack": _backpack(),
    "teapot": _teapot(),
    "duck": _duck(),
}
