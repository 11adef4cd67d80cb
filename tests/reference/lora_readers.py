"""What other programs compute from a LoRA file, written again from their behaviour (sources read July 2023 to August 2026).

Every function takes the file's tensors, a module's key, the base's weight and a strength, and returns the weight that the
program would use. None of this shares code with finetune. Arithmetic in float64.
"""

import math

import torch

EPS = torch.finfo(torch.float32).eps


def part(file, key, name):
    value = file.get(f"{key}.{name}")
    return None if value is None else value.double()


def kohya(file, key, weight, strength=1.0):
    """sd-scripts, networks/merge_lora.py: W + ratio * up @ down * (alpha / rank); no alpha or 0 is alpha = rank."""
    down, up, alpha = part(file, key, "lora_down.weight"), part(file, key, "lora_up.weight"), part(file, key, "alpha")
    rank = down.shape[0]
    scale = 1.0 if alpha is None or alpha.item() == 0 else alpha.item() / rank
    if weight.ndim == 4 and down.shape[2:] != (1, 1):
        change = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    else:
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weight.double() + strength * scale * change


def peft(file, path, weight, strength=1.0):
    """PEFT through diffusers, a file without adapter metadata: alpha = rank, so the scale is 1."""
    down, up = part(file, path, "lora_A.weight"), part(file, path, "lora_B.weight")
    return weight.double() + strength * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(weight.shape)


def low_rank(file, key, shape):
    """The product of a pair, with LoCon's middle weight, and its rank."""
    down, up, mid = (part(file, key, f"lora_{name}.weight") for name in ("down", "up", "mid"))
    if mid is not None:
        down = torch.einsum("ms...,si->mi...", mid, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(shape), up.shape[1]


def cp(core, a, b):
    """Tucker form as all three programs rebuild it."""
    return torch.einsum("abkl,bi,ao->oikl", core, b, a)


def hadamard(file, key, shape):
    factors = []
    for number in (1, 2):
        a, b, core = (part(file, key, f"hada_{name}") for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
        factors.append(a @ b if core is None else cp(core, a, b))
        rank = b.shape[0]
    return (factors[0] * factors[1]).reshape(shape), rank


def kronecker(file, key, shape):
    """The product, and the rank that divides alpha: that of the second factor before the first's; None for two whole ones."""
    rank, factors = None, []
    for number in (1, 2):
        whole, a, b = (part(file, key, f"lokr_w{number}{end}") for end in ("", "_a", "_b"))
        if whole is None:
            rank, core = b.shape[0], part(file, key, f"lokr_t{number}")
            whole = a @ b if core is None else cp(core, a, b)
        factors.append(whole)
    first, second = factors
    if second.ndim == 4:
        first = first.reshape(*first.shape, 1, 1)
    return torch.kron(first, second.contiguous()).reshape(shape), rank


def addition(file, key, shape):
    """(change, rank) of any kind that adds to the weight."""
    if f"{key}.lora_up.weight" in file:
        return low_rank(file, key, shape)
    if f"{key}.hada_w1_a" in file:
        return hadamard(file, key, shape)
    return kronecker(file, key, shape)


def comfyui(file, key, weight, strength=1.0):
    """comfy/lora.py and comfy/weight_adapter; Forge's copy is the same. No alpha is scale 1."""
    weight = weight.double()
    if f"{key}.diff" in file:
        return weight + strength * part(file, key, "diff")
    alpha = part(file, key, "alpha")
    if f"{key}.oft_blocks" in file:
        blocks = part(file, key, "oft_blocks")
        skew = blocks - blocks.mT
        bound = 0 if alpha is None else alpha.item()
        if bound > 0 and skew.norm() + 1e-8 > bound:
            skew = skew * bound / (skew.norm() + 1e-8)
        eye = torch.eye(skew.shape[-1], dtype=torch.float64)
        turn = (eye + skew) @ torch.linalg.inv(eye - skew)
        parts = weight.reshape(*skew.shape[:2], *weight.shape[1:])
        return weight + strength * torch.einsum("knm,kn...->km...", turn - eye, parts).reshape(weight.shape)
    change, rank = addition(file, key, weight.shape)
    scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
    lengths = part(file, key, "dora_scale")
    if lengths is None:
        return weight + strength * scale * change
    merged = weight + scale * change
    if lengths.shape[0] == weight.shape[0]:  # of outputs: ComfyUI divides by the norm of the base's rows
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = columns(merged)
    return weight + strength * (merged * (lengths / (norm + EPS)) - weight)


def columns(weight):
    """Norm for each input."""
    return weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))


def a1111(file, key, weight, strength=1.0):
    """extensions-builtin/Lora of 1.10: alpha / rank when both are known, else 1; DoRA's lengths always of inputs."""
    weight = weight.double()
    if f"{key}.diff" in file:
        return weight + strength * part(file, key, "diff")
    alpha = part(file, key, "alpha")
    if f"{key}.oft_blocks" in file:
        blocks = part(file, key, "oft_blocks")
        skew, eye = blocks - blocks.mT, torch.eye(blocks.shape[-1], dtype=torch.float64)
        if alpha is not None:
            norm = skew.norm().item()
            skew = skew * ((min(norm, alpha.item() * weight.shape[0]) + 1e-8) / (norm + 1e-8))
        turn = (eye + skew) @ torch.linalg.inv(eye - skew)
        new = torch.einsum("knm,kn...->km...", turn, weight.reshape(*skew.shape[:2], *weight.shape[1:])).reshape(weight.shape)
        return weight + strength * (new - weight)
    change, rank = addition(file, key, weight.shape)
    scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
    lengths = part(file, key, "dora_scale")
    if lengths is None:
        return weight + strength * scale * change
    merged = weight + change * scale
    return weight + strength * (merged * (lengths / columns(merged)) - weight)


def lycoris(file, key, weight, strength=1.0):
    """LyCORIS 3, DoRA over outputs (wd_on_output): the norm is of the merged rows, and the strength scales the factor."""
    weight = weight.double()
    change, rank = addition(file, key, weight.shape)
    merged = weight + change * (part(file, key, "alpha").item() / rank)
    norm = merged.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1)) + EPS
    return merged * (strength * (part(file, key, "dora_scale") / norm - 1) + 1)


def cayley(upper, terms=5):
    """PEFT's series for a rotation from the entries above the diagonal, one block."""
    size = (1 + math.isqrt(1 + 8 * len(upper))) // 2
    skew = torch.zeros(size, size, dtype=torch.float64)
    place = 0
    for row in range(size):
        for column in range(row + 1, size):
            skew[row, column], skew[column, row] = upper[place], -upper[place]
            place += 1
    powers = [torch.linalg.matrix_power(skew, n) for n in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
