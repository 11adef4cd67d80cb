"""The battery every registered method passes: only its tensors move, step zero is the base, gradients are right,
the same seed gives the same bytes, previews disturb nothing, resumed equals uninterrupted, and what is exported gives
the same latents in a new process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from finetune import data, methods, runs
from finetune.model import load, render
from finetune.training import fit, train
from finetune.training.loop import at_rest, loss_of, prepare

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dreambooth": ("dreambooth", {"prior": "none", "learning_rate": 1e-3}),
    "dreambooth-prior": ("dreambooth", {"prior": "images", "class_images": 2, "class_steps": 1, "learning_rate": 1e-3, "ema_decay": 0.9}),
    "dreambooth-text": ("dreambooth", {"prior": "distill", "train_text_encoder": True, "learning_rate": 1e-3}),
    "textual-inversion": ("textual-inversion", {"placeholder": "<my-box>", "vectors": 2, "learning_rate": 1e-2}),
    "lora": ("lora", {"rank": 4, "alpha": 2.0, "learning_rate": 1e-2}),
    "lora-text": ("lora", {"rank": 4, "text_encoder_rank": 2, "targets": "attention", "learning_rate": 1e-2}),
    "lora-rslora": ("lora", {"rank": 4, "variant": "rslora", "learning_rate": 1e-2}),
    "lora-dora": ("lora", {"rank": 4, "variant": "dora", "learning_rate": 1e-2}),
    "lora-loha": ("lora", {"rank": 4, "variant": "loha", "learning_rate": 1e-2}),
    "lora-lokr": ("lora", {"rank": 4, "variant": "lokr", "learning_rate": 1e-2}),
    "lora-oft": ("lora", {"rank": 8, "variant": "oft", "learning_rate": 1e-2}),
    "hypernetwork": ("hypernetwork", {"learning_rate": 1e-2}),
    "hypernetwork-key-query": ("hypernetwork", {"transform": "key,query", "learning_rate": 1e-2, "dropout": 0.3}),
    "hypernetwork-all": ("hypernetwork", {"transform": "query,key,value", "scope": "all", "layer_norm": True, "learning_rate": 1e-2}),
}
PROMPT = {"textual-inversion": "a photo of a <my-box>"}


def settings_of(case: str, model: Path, pictures: Path, output: Path, **more: Any) -> Any:
    name, own = CASES[case]
    given = {"model": str(model), "instance_dir": pictures, "class_noun": "backpack", "resolution": 32, "batch_size": 2, "steps": 3, "output": output,
             "export_dtype": "fp32", "validate_every": 0, "log_every": 1}
    return methods.get(name).Settings(**(given | own | more))


def quiet() -> Console:
    return Console(file=open("/dev/null", "w"), width=80)  # noqa: SIM115 - lives as long as the console


def digests(base: Any) -> dict[str, str]:
    """SHA-256 of every tensor of every network; learned rows and adapters are among them."""
    return {f"{part}.{name}": hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
            for part, module in base.modules().items() for name, value in module.state_dict().items()}


class Trial:
    """A method attached to the tiny base, ready for single steps."""

    def __init__(self, case: str, model: Path, pictures: Path, output: Path, **more: Any):
        self.settings = settings_of(case, model, pictures, output, **more)
        self.method = methods.get(self.settings.METHOD)(self.settings)
        self.base = load(str(model))
        found = data.intake(self.settings)
        captions = data.caption_candidates(found.pictures, self.method.templates(), self.method.subject)
        classes = found.pictures[:2] if self.settings.prior == "images" else []
        self.source = data.source(self.settings, found, classes, self.base.vae, captions, "a photo of a backpack")
        self.accelerator = Accelerator(cpu=True)

    def attach(self) -> Any:
        self.state = prepare(self.base, self.method, self.settings, self.accelerator)
        return self.state

    def losses(self) -> list[float]:
        return [float(step.loss) for step in fit(self.base, self.method, self.source, self.settings, self.accelerator, self.state)]


@pytest.mark.parametrize("case", CASES)
def test_only_its_tensors_move(case: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    trial = Trial(case, tiny_model, pictures_dir, tmp_path)
    state = trial.attach()
    before = digests(trial.base)
    mine = {hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for value in state.parameters.values()}
    start = {name: value.detach().clone() for name, value in state.parameters.items()}
    trial.losses()
    moved = [name for name, digest in digests(trial.base).items() if digest != before[name]]
    assert all(before[name] in mine for name in moved), moved[:5]
    still = [name for name, value in state.parameters.items() if torch.equal(value, start[name])]
    assert len(still) <= 0.3 * len(start), still  # LoKr and layers the loss does not reach may keep a few
    assert not any(value.requires_grad for part in trial.base.modules().values() for value in part.parameters()
                   if not any(value is own for own in state.parameters.values()))


@pytest.mark.parametrize("case", CASES)
def test_step_zero_is_the_base(case: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    prompts = ["a photo of a backpack", "a red mug"]
    plain = render(load(str(tiny_model)), prompts, [1, 2], steps=2, output="latent")
    trial = Trial(case, tiny_model, pictures_dir, tmp_path)
    trial.attach()
    attached = render(trial.base, prompts, [1, 2], steps=2, output="latent")
    tolerance = 0.0 if trial.method.name != "lora" else 1e-6
    for one, other in zip(plain, attached, strict=True):
        assert (one - other).abs().max() <= tolerance
    if trial.method.name == "textual-inversion":  # the new word starts as the class noun
        ids = trial.base.tokenizer("backpack", add_special_tokens=False).input_ids
        table = trial.base.text_encoder.get_input_embeddings().weight
        assert torch.equal(trial.state.parameters["rows"][0], table[ids[0]])


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dreambooth")] + ["dreambooth"])
def test_gradients_against_finite_differences(case: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """Directional derivative of the training loss in float64, away from the start (where a zero factor hides errors)."""
    trial = Trial(case, tiny_model, pictures_dir, tmp_path)
    state = trial.attach()
    for part in trial.base.modules().values():
        part.double()
    values = list(state.parameters.values())
    generator = torch.Generator().manual_seed(3)
    for network in getattr(trial.method, "networks", {}).values():
        network.double().eval()
    with torch.no_grad():
        for value in values:
            value.data = value.data.double()
            value += 0.02 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if trial.method.name == "textual-inversion":
        trial.base.text_encoder.get_input_embeddings().rows.data = values[0].data
    batch = trial.source.batch(0)
    batch.latents = batch.latents.double()
    trial.base.states.clear()
    loss_of(trial.base, trial.method, batch, trial.settings).backward()
    direction = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in values]
    if case == "lora-dora":  # DoRA's factors see the norm as a constant (Liu et al. 2024, sec. 4.3): only its magnitudes have a true derivative
        direction = [way if "magnitude" in name else 0 * way for name, way in zip(state.parameters, direction, strict=True)]
    slope = sum((value.grad * way).sum().item() for value, way in zip(values, direction, strict=True) if value.grad is not None)

    def moved(by: float) -> float:
        with torch.no_grad():
            for value, way in zip(values, direction, strict=True):
                value += by * way
            found = loss_of(trial.base, trial.method, batch, trial.settings).item()
            for value, way in zip(values, direction, strict=True):
                value -= by * way
        return found

    width = 1e-7  # small, for ReLU has kinks
    assert slope == pytest.approx((moved(width) - moved(-width)) / (2 * width), rel=2e-4)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, pictures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of every case, from settings to artifact."""
    root = tmp_path_factory.mktemp("runs")
    return {case: train(settings_of(case, tiny_model, pictures_dir, root / case), quiet()) for case in CASES}


@pytest.mark.parametrize("case", ["dreambooth-prior", "textual-inversion", "lora", "hypernetwork-key-query"])
def test_same_seed_same_bytes_and_previews_change_nothing(case: str, finished: dict[str, Path], tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    settings = settings_of(case, tiny_model, pictures_dir, tmp_path / case, preview_every=2, validate_every=1, checkpoint_every=1)
    again = train(settings, quiet())
    assert artifact_hashes(again) == artifact_hashes(finished[case])
    assert len(list((again / "previews").iterdir())) == 2  # after the second step and after the third, the last
    other = train(settings_of(case, tiny_model, pictures_dir, tmp_path / "other", seed=1), quiet())
    assert artifact_hashes(other) != artifact_hashes(again)


def artifact_hashes(folder: Path) -> dict[str, str]:
    """Weights only: metadata holds nothing that differs between equal runs, finetune.json included."""
    return {entry["file"]: entry["sha256"] for entry in runs.read_json(folder / "artifact" / "artifact.json")["files"]}


@pytest.mark.parametrize("case", ["dreambooth-prior", "dreambooth-text", "textual-inversion", "lora", "hypernetwork-key-query"])
def test_resumed_equals_uninterrupted(case: str, finished: dict[str, Path], tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.training import run

    real = run.fit

    def stops_after_one(*arguments: Any) -> Any:
        for progress in real(*arguments):
            yield progress
            if progress.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", stops_after_one)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(case, tiny_model, pictures_dir, tmp_path / "run", checkpoint_every=1), quiet())
    assert runs.read_json(tmp_path / "run" / "manifest.json")["status"] == "failed"
    monkeypatch.setattr(run, "fit", real)
    train(settings_of(case, tiny_model, pictures_dir, tmp_path / "run", checkpoint_every=1, resume=True), quiet())
    assert artifact_hashes(tmp_path / "run") == artifact_hashes(finished[case])
    told = [(line["step"], line["loss"]) for line in runs.read_metrics(tmp_path / "run") if "loss" in line]
    whole = [(line["step"], line["loss"]) for line in runs.read_metrics(finished[case]) if "loss" in line]
    assert told == whole


def test_export_new_process_load_same_latents(finished: dict[str, Path], tiny_model: Path, pictures_dir: Path, tmp_path: Path) -> None:
    """What the trained model in memory draws, a fresh process draws from the artifact alone."""
    expected: dict[str, torch.Tensor] = {}
    for case in finished:
        trial = Trial(case, tiny_model, pictures_dir, tmp_path / case)
        if CASES[case][1].get("prior") == "images":
            continue  # its class pictures come from the cache; the loaded weights are compared below
        trial.attach()
        trial.losses()
        prompt = PROMPT.get(trial.method.name, "a photo of a sks backpack")
        with trial.method.exported(), at_rest(trial.base, trial.method):
            expected[case] = render(trial.base, [prompt], [5], steps=2, output="latent")[0]
    script = """
import json, sys, torch
from finetune import methods
from finetune.model import load, render
told = json.load(open(sys.argv[1]))
found = {}
for case, (folder, prompt) in told["cases"].items():
    base = load(told["model"])
    methods.load_artifact(base, folder)
    found[case] = render(base, [prompt], [5], steps=2, output="latent")[0]
torch.save(found, sys.argv[2])
"""
    cases = {case: (str(finished[case]), PROMPT.get(CASES[case][0], "a photo of a sks backpack")) for case in expected}
    (tmp_path / "told.json").write_text(json.dumps({"model": str(tiny_model), "cases": cases}))
    subprocess.run([sys.executable, "-c", script, tmp_path / "told.json", tmp_path / "found.pt"], check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    base = render(load(str(tiny_model)), ["a photo of a sks backpack"], [5], steps=2, output="latent")[0]
    for case, latents in expected.items():
        assert (found[case] - latents).abs().max() < 2e-5, case
        assert (found[case] - base).abs().max() > 1e-4, f"{case} learned nothing, so the comparison proves nothing"


def test_strength_goes_from_base_to_artifact(finished: dict[str, Path], tiny_model: Path) -> None:
    for case in ("dreambooth", "lora", "hypernetwork"):
        drawn = []
        for strength in (0.0, 0.5, 1.0):
            base = load(str(tiny_model))
            methods.load_artifact(base, finished[case], strength)
            drawn.append(render(base, ["a photo of a sks backpack"], [5], steps=2, output="latent")[0])
        plain = render(load(str(tiny_model)), ["a photo of a sks backpack"], [5], steps=2, output="latent")[0]
        assert torch.equal(drawn[0], plain)
        near, far = ((latents - plain).abs().mean() for latents in drawn[1:])
        assert 0.2 * far < near < 0.9 * far, case


def test_plain_diffusers_gives_the_same_picture(finished: dict[str, Path], tiny_model: Path) -> None:
    """The files load through diffusers' own loaders, and its pipeline draws what `load_artifact` draws."""
    from diffusers import StableDiffusionPipeline

    from finetune.model.sampling import scheduler

    def ours(case: str, prompt: str) -> torch.Tensor:
        base = load(str(tiny_model))
        methods.load_artifact(base, finished[case])
        return torch.as_tensor(render(base, [prompt], [5], steps=2, output="latent")[0])

    def theirs(pipe: Any, prompt: str) -> torch.Tensor:
        pipe.scheduler = scheduler(load(str(tiny_model)), "dpm++")
        pipe.set_progress_bar_config(disable=True)
        return pipe(prompt, num_inference_steps=2, guidance_scale=4.0, negative_prompt="", generator=torch.Generator().manual_seed(5), output_type="latent").images[0]

    def plain() -> Any:
        return StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None, local_files_only=True)

    pipe = plain()
    for file in ("pytorch_lora_weights.safetensors", "sks-backpack.safetensors"):
        with contextlib.suppress(Exception):
            pipe.unload_lora_weights()
        pipe.load_lora_weights(str(finished["lora"] / "artifact"), weight_name=file)
        assert (theirs(pipe, "a photo of a sks backpack") - ours("lora", "a photo of a sks backpack")).abs().max() < 2e-5, file
    pipe = plain()
    pipe.load_textual_inversion(str(finished["textual-inversion"] / "artifact"), weight_name="learned_embeds.safetensors")
    assert (theirs(pipe, "a photo of a <my-box>") - ours("textual-inversion", "a photo of a <my-box>")).abs().max() < 2e-5
    pipe = StableDiffusionPipeline.from_pretrained(str(finished["dreambooth"] / "artifact"), safety_checker=None, local_files_only=True)
    assert (theirs(pipe, "a photo of a sks backpack") - ours("dreambooth", "a photo of a sks backpack")).abs().max() < 2e-5
