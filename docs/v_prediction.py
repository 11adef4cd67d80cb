"""What docs/toybox.md shows of the v-prediction variant:

    finetune toybox variant v-prediction --output V
    finetune toybox evaluate --model V --output CARD
    python docs/v_prediction.py V CARD

prints both tables and draws images/toybox-v.webp: the same prompts and seeds by the shipped base and by the variant.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from finetune import diffusion
from finetune.model import load, render
from finetune.model.text import encode_cached
from finetune.toybox.captions import full_caption
from finetune.toybox.datasets import describe, pixels
from finetune.toybox.variant import v_of_noise
from finetune.toybox.variant_sheet import sheet

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "finetune" / "toybox" / "weights" / "evaluation.json"
TIMESTEPS = (20, 250, 600, 950)
PROMPTS = ("a photo of a red mug with white dots on the beach", "a drawing of a green cat in the snow", "a photo of a blue robot at night",
           "a watercolor painting of a pink house in the forest", "pixel art of a yellow duck on a table", "a photo of a black car in the city")


@torch.no_grad()
def errors(v_model: str, count: int = 32) -> None:
    """Mean squared error of v on pictures none of the two was trained on, by timestep."""
    bases = {"noise": load("toybox"), "v": load(v_model)}
    described = describe(count, 12345)
    shown = torch.from_numpy(pixels(described, processes=1)).float() / 127.5 - 1
    latents = bases["noise"].vae.encode(shown).latent_dist.mean * bases["noise"].vae.config.scaling_factor
    prompts = [full_caption(one) for one in described]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    print("| timestep | signal share | noise taken for v | converted | the variant |\n|---|---|---|---|---|")
    for timestep in TIMESTEPS:
        steps = torch.full((count,), timestep)
        schedule = bases["v"].schedule
        noisy = diffusion.add_noise(latents, noise, steps, schedule)
        wanted = diffusion.target(latents, noise, steps, schedule, "v_prediction")
        said = bases["noise"].ask(noisy, steps, encode_cached(bases["noise"], prompts))
        own = bases["v"].ask(noisy, steps, encode_cached(bases["v"], prompts))
        found = [(one - wanted).square().mean().item() for one in (said, v_of_noise(said, noisy, schedule[steps]), own)]
        print(f"| {timestep} | {schedule[timestep]:.3f} | " + " | ".join(f"{value:.3f}" for value in found) + " |")


def bars(card: Path) -> None:
    """The bars of both, side by side."""
    told = [{row["title"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["group"] in ("base", "held-out triples")}
            for path in (SHIPPED, card / "evaluation.json")]
    print("| | asked | the base | the variant |\n|---|---|---|---|")
    for title, row in told[0].items():
        one = [f"{each[title]['measured']:.3f} ({each[title]['low']:.2f}-{each[title]['high']:.2f})" for each in told]
        print(f"| {title} | {'≥ ' + format(row['bar'], '.2f') if row['bar'] else '-'} | {one[0]} | {one[1]} |")


def main(v_model: str, card: Path) -> None:
    """Both tables and the sheet."""
    errors(v_model)
    bars(card)
    seeds = list(range(len(PROMPTS)))
    rows = [[(picture, words) for picture, words in zip(render(load(model), list(PROMPTS), seeds), labels, strict=True)]
            for model, labels in (("toybox", PROMPTS), (v_model, ["the same, predicting v"] * len(PROMPTS)))]
    sheet(rows).save(HERE / "images" / "toybox-v.webp", quality=92, method=6)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
