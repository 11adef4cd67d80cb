"""The four methods on a tiny base of SDXL's shape: only their tensors move, step zero is the base, training lowers the
loss, and what is exported gives the same word on a fresh base and in plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from test_methods_battery import Trial, digests, quiet, settings_of

from finetune import methods, runs
from finetune.formats.header import read_header
from finetune.model import load
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import encode
from finetune.training import train
from finetune.training.loop import at_rest, loss_of

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # battery case (its method), what is different here
    "dreambooth": ("dreambooth", {}),
    "dreambooth-text": ("dreambooth-text", {"learning_rate": 3e-4}),
    "textual-inversion": ("textual-inversion", {"learning_rate": 3e-2}),
    "lora-text": ("lora-text", {}),
    "hypernetwork-all": ("hypernetwork", {"scope": "all"}),
}


def word_of(base: Base, prompt: str) -> torch.Tensor:
    """What the network says at a fixed place."""
    generator = torch.Generator().manual_seed(9)
    noisy = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return base.ask(noisy, torch.tensor([400]), encode(base, [prompt]))


def prompt_of(case: str) -> str:
    return "a photo of a <my-box>" if case == "textual-inversion" else "a photo of a sks backpack"


@pytest.fixture(scope="module")
def trained(tiny_xl_model: Path, pictures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each case after four steps on one batch: its artifact, and the network's word; what must hold on the way is asserted here."""
    found = {}
    plain = word_of(load(str(tiny_xl_model)), "a photo of a backpack")
    for case, (battery, own) in CASES.items():
        folder = tmp_path_factory.mktemp(case)
        trial = Trial(battery, tiny_xl_model, pictures_dir, folder, steps=4, **own)
        state = trial.attach()
        torch.testing.assert_close(word_of(trial.base, "a photo of a backpack"), plain, atol=1e-6, rtol=0)
        before, start = digests(trial.base), {name: value.detach().clone() for name, value in state.parameters.items()}
        batch = trial.source.batch(0)
        trial.source.batch = lambda *place, batch=batch: batch
        first = loss_of(trial.base, trial.method, batch, trial.settings).item()
        trial.losses()
        with at_rest(trial.base, trial.method):
            assert loss_of(trial.base, trial.method, batch, trial.settings).item() < first, case
            moved = {name for name, digest in digests(trial.base).items() if digest != before[name]}
            own_ids = {id(value) for value in state.parameters.values()}
            mine = {f"{part}.{name}" for part, module in trial.base.modules().items() for name, value in module.named_parameters() if id(value) in own_ids}
            assert moved <= mine, sorted(moved - mine)[:3]
            changed = {name.split(".")[0] for name, value in state.parameters.items() if not torch.equal(value, start[name])}
            found[case] = (folder / "artifact", word_of(trial.base, prompt_of(case)), changed)
            trial.method.export(trial.base, folder / "artifact", {"finetune.trigger": trial.method.trigger})
    return found


def test_both_encoders_train_where_text_does(trained: dict[str, Any]) -> None:
    assert {case: sorted(changed) for case, (_, _, changed) in trained.items()} == {
        "dreambooth": ["unet"], "dreambooth-text": ["text_encoder", "text_encoder_2", "unet"], "textual-inversion": ["rows", "rows_2"],
        "lora-text": ["text_encoder", "text_encoder_2", "unet"], "hypernetwork-all": ["networks"]}


@pytest.mark.parametrize("case", CASES)
def test_export_then_load_gives_the_same_word(case: str, trained: dict[str, Any], tiny_xl_model: Path) -> None:
    folder, word, _ = trained[case]
    base = load(str(tiny_xl_model))
    assert methods.load_artifact(base, folder).trigger == ("<my-box>" if case == "textual-inversion" else "sks backpack")
    torch.testing.assert_close(word_of(base, prompt_of(case)), word, atol=1e-5, rtol=0)
    plain = word_of(load(str(tiny_xl_model)), prompt_of(case))
    assert (plain - word).abs().max() > 1e-4  # it learned something, so the comparison says something


def test_plain_diffusers_reads_what_was_exported(trained: dict[str, Any], tiny_xl_model: Path) -> None:
    def said(pipe: Any, prompt: str, by: Base) -> torch.Tensor:
        with torch.no_grad():
            states, _, pooled, _ = pipe.encode_prompt([prompt], device="cpu", do_classifier_free_guidance=False)
            noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
            return pipe.unet(**by.question(noisy, torch.tensor([400]), Cond(states, pooled))).sample

    base = load(str(tiny_xl_model))

    def pipe_of(folder: Path) -> Any:
        return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)

    folder, word, _ = trained["dreambooth-text"]
    torch.testing.assert_close(said(pipe_of(folder), prompt_of("dreambooth"), base), word, atol=1e-5, rtol=0)
    for name in ("text_encoder", "text_encoder_2"):  # names as transformers 4 wants them
        assert all(key.startswith(("text_model.", "text_projection.")) for key in read_header(folder / name / "model.safetensors").tensors)
    folder, word, _ = trained["lora-text"]
    for file in ("sks-backpack.safetensors", "pytorch_lora_weights.safetensors"):
        pipe = pipe_of(tiny_xl_model)
        pipe.load_lora_weights(str(folder), weight_name=file)
        torch.testing.assert_close(said(pipe, prompt_of("lora"), base), word, atol=1e-5, rtol=0)
    folder, word, _ = trained["textual-inversion"]
    pipe = pipe_of(tiny_xl_model)
    for number, (encoder, tokenizer) in {"": (pipe.text_encoder, pipe.tokenizer), "_2": (pipe.text_encoder_2, pipe.tokenizer_2)}.items():
        pipe.load_textual_inversion(str(folder), weight_name=f"learned_embeds{number}.safetensors", text_encoder=encoder, tokenizer=tokenizer)
    torch.testing.assert_close(said(pipe, prompt_of("textual-inversion"), base), word, atol=1e-5, rtol=0)


def test_files_of_the_layouts_other_programs_read(trained: dict[str, Any]) -> None:
    lora = read_header(trained["lora-text"][0] / "sks-backpack.safetensors")
    assert {key.split("_", 2)[1] for key in lora.tensors} == {"unet", "te1", "te2"}
    assert all("_text_model_" in key for key in lora.tensors if key.startswith("lora_te"))
    word = read_header(trained["textual-inversion"][0] / "my-box.safetensors").tensors
    assert {key: info.shape for key, info in word.items()} == {"clip_l": (2, 24), "clip_g": (2, 56)}
    networks = torch.load(trained["hypernetwork-all"][0] / "sks-backpack.pt", weights_only=True)
    assert {key for key in networks if isinstance(key, int)} == {64, 80}  # hidden and text states


def test_a_whole_run_with_class_pictures(tiny_xl_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """Class pictures are rendered by the untouched base, previews by the trained one; the artifact is a whole SDXL folder."""
    settings = settings_of("dreambooth-prior", tiny_xl_model, pictures_dir, tmp_path / "run", steps=1, preview_every=1)
    folder = train(settings, quiet())
    manifest = runs.read_json(folder / "manifest.json")
    assert (manifest["status"], manifest["model"]["family"]) == ("finished", "sdxl")
    assert load(str(folder / "artifact")).family == "sdxl"
    assert len(list((folder / "previews").iterdir())) == 1
