"""`finetune export`, `--export` and `--push-to-hub`, as typed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from finetune import methods, runs
from finetune.cli import app, hub
from finetune.cli.targets import CONVERSIONS, EXPORTS
from finetune.errors import Problem
from finetune.formats import ldm, lora
from finetune.formats.acceptance import check
from finetune.model import load
from finetune.training import train

QUIET: dict[str, Any] = {"steps": 1, "resolution": 32, "validate_every": 0, "preview_every": 0, "checkpoint_every": 0, "class_noun": "dog", "prior": "none"}


def trained(method: str, folder: Path, model: Path, pictures: Path, **more: Any) -> Path:
    settings = methods.get(method).Settings(model=str(model), instance_dir=pictures, output=folder, **{**QUIET, **more})
    return train(settings, Console(quiet=True))


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory, tiny_model, pictures_dir) -> dict[str, Path]:
    """A run of one step of each method; DreamBooth with its single file."""
    folder = tmp_path_factory.mktemp("runs")
    told: dict[str, dict[str, Any]] = {"lora": {"rank": 2}, "textual-inversion": {"vectors": 2}, "hypernetwork": {}, "dreambooth": {"export": ["single-file"]}}
    return {method: trained(method, folder / method, tiny_model, pictures_dir, **more) for method, more in told.items()}


@pytest.mark.parametrize(("method", "target", "files"), [
    ("lora", "diffusers", ["pytorch_lora_weights.safetensors"]), ("lora", "webui", ["sks-dog.safetensors"]), ("lora", "kohya", ["sks-dog.safetensors"]),
    ("textual-inversion", "diffusers", ["learned_embeds.safetensors"]), ("textual-inversion", "webui", ["my-dog.pt", "my-dog.safetensors"]),
    ("textual-inversion", "kohya", ["my-dog.safetensors"]), ("hypernetwork", "webui", ["sks-dog.pt"]),
    ("dreambooth", "webui", ["sks-dog.safetensors"]), ("dreambooth", "kohya", ["sks-dog.safetensors"]), ("dreambooth", "single-file", ["sks-dog.safetensors"])])
def test_every_method_reaches_its_programs(some_runs, tmp_path, method, target, files, capfd):
    assert app.run(["export", str(some_runs[method]), "--to", target, "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    printed = capfd.readouterr().out
    for path in tmp_path.iterdir():
        assert check(path) == [] and f"{path}  {path.stat().st_size:,} bytes" in printed


def test_what_training_wrote_by_itself_meets_the_list_and_the_announced_size(some_runs, tiny_model):
    for method, run in some_runs.items():
        for path in [*(run / "artifact").glob("*.safetensors"), *(run / "artifact").glob("*.pt")]:
            assert check(path) == [], f"{method}: {path.name}"
    folder = some_runs["dreambooth"] / "artifact"
    assert check(folder) == []
    method = methods.get("dreambooth")(methods.get("dreambooth").Settings(**{**QUIET, "steps": 1}, export=["single-file"]))
    told = runs.read_json(folder / "artifact.json")["metadata"]
    assert method.added_files(load(str(tiny_model)), told) == {"sks-dog.safetensors": (folder / "sks-dog.safetensors").stat().st_size}
    single, parts = load_file(folder / "sks-dog.safetensors"), ldm.of_folder(folder)
    assert all(torch.equal(entry.load(), single[key]) for key, entry in ldm.entries(parts, None).items())


def test_the_folder_of_a_trained_model_is_exported_and_loads(some_runs, tmp_path):
    assert app.run(["export", str(some_runs["dreambooth"]), "--to", "diffusers", "--output", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert check(tmp_path / "out") == [] and not (tmp_path / "out" / "sks-dog.safetensors").exists()
    ours, theirs = load(str(tmp_path / "out")), load(str(some_runs["dreambooth"] / "artifact"))
    assert all(torch.equal(value, theirs.unet.state_dict()[name]) for name, value in ours.unet.state_dict().items())


@pytest.mark.parametrize(("method", "target", "said"), [("lora", "single-file", "finetune merge"), ("textual-inversion", "single-file", "An embedding is a word"),
                                                        ("hypernetwork", "diffusers", "diffusers has no hypernetworks"), ("hypernetwork", "kohya", "dropped hypernetworks")])
def test_what_a_program_cannot_read_is_refused_with_what_can(some_runs, tmp_path, method, target, said, capsys):
    assert app.run(["export", str(some_runs[method]), "--to", target, "--output", str(tmp_path / "x")]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "x").exists()


def test_key_and_query_hypernetworks_do_not_reach_the_web_ui(tmp_path, tiny_model, pictures_dir, capsys):
    run = trained("hypernetwork", tmp_path / "kq", tiny_model, pictures_dir, transform="key,query")
    assert app.run(["export", str(run), "--to", "webui", "--output", str(tmp_path / "x")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "transforms query and key" in said and "--transform key,value" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("method", "target"), [("hypernetwork", "single-file"), ("lora", "single-file"), ("dreambooth", "lollipop")])
def test_impossible_targets_are_refused_before_training(tmp_path, tiny_model, pictures_dir, method, target):
    with pytest.raises(Problem, match=f"--export {target} is not available"):
        trained(method, tmp_path / "run", tiny_model, pictures_dir, export=[target])
    assert not (tmp_path / "run").exists()


def test_files_that_are_there_stay_unless_told(some_runs, tmp_path, capsys):
    words = ["export", str(some_runs["lora"]), "--to", "kohya", "--output", str(tmp_path / "dog.safetensors")]
    assert app.run(words) == 0 and app.run(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert app.run([*words, "--overwrite"]) == 0
    assert app.run([*words[:4], "--output", str(tmp_path / "dog.pt")]) == 2
    assert app.run([*words[:4], "--output", str(tmp_path), "--name", "../dog"]) == 2
    file = some_runs["lora"] / "artifact" / "sks-dog.safetensors"
    assert app.run(["export", str(file), "--to", "kohya", "--output", str(file), "--overwrite"]) == 2
    assert lora.read(tmp_path / "dog.safetensors")[1]["ss_output_name"] == "dog"


def test_only_layouts_that_the_tables_name_are_offered():
    assert set(EXPORTS) == set(CONVERSIONS) == {"lora", "embedding", "hypernetwork", "model"}
    assert set(EXPORTS["model"]) == {"diffusers", "webui", "kohya", "single-file"} and set(EXPORTS["hypernetwork"]) == {"webui"}


class FakeApi:
    """Stands where huggingface_hub's HfApi stands; notes what would go over the network."""

    seen: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, **told: Any) -> None:
        self.seen.append(("create", repository, told))

    def upload_folder(self, **told: Any) -> None:
        files = {str(path.relative_to(told["folder_path"])): path.read_bytes() for path in Path(told["folder_path"]).rglob("*") if path.is_file()}
        self.seen.append(("upload", told["repo_id"], files))


@pytest.fixture()
def fake_hub(monkeypatch):
    import huggingface_hub

    FakeApi.seen = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecret")
    return FakeApi.seen


def test_an_upload_holds_artifact_card_and_drawn_pictures_only(some_runs, tmp_path, fake_hub, capfd):
    run = tmp_path / "lora"
    shutil.copytree(some_runs["lora"], run)
    (run / "previews").mkdir(exist_ok=True)
    from PIL import Image, PngImagePlugin

    secret = PngImagePlugin.PngInfo()
    secret.add_text("instance_dir", "/home/someone/private")
    for number in range(8):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(run / "previews" / f"0000001-{number}.png", pnginfo=secret)
    assert app.run(["export", str(run), "--push-to-hub", "someone/dog"]) == 0
    (_, repository, told), (_, also, files) = fake_hub
    assert repository == also == "someone/dog" and told["private"] is True
    names = {path.name for path in (run / "artifact").iterdir()} | {"README.md"} | {f"samples/{number}.png" for number in range(1, 7)}
    assert set(files) == names
    everything = b"".join(files.values()) + capfd.readouterr().out.encode()
    assert b"hf_Secret" not in everything and b"/home/someone/private" not in everything
    assert b"picture-0" not in everything and str(run).encode() not in files["README.md"]


def test_nothing_is_uploaded_without_the_flag_and_a_bad_name_costs_no_training(tmp_path, tiny_model, pictures_dir, fake_hub, some_runs):
    assert app.run(["export", str(some_runs["lora"]), "--to", "kohya", "--output", str(tmp_path)]) == 0 and fake_hub == []
    words = ["lora", "--model", str(tiny_model), "--instance-dir", str(pictures_dir), "--class-noun", "dog", "--steps", "1", "--resolution", "32",
             "--validate-every", "0", "--rank", "2"]
    assert app.run([*words, "--output", str(tmp_path / "bad"), "--push-to-hub", "not a name"]) == 2 and not (tmp_path / "bad").exists()
    assert app.run([*words, "--output", str(tmp_path / "good"), "--push-to-hub", "someone/dog"]) == 0
    assert [what for what, *_ in fake_hub] == ["create", "upload"] and "README.md" in fake_hub[1][2]


def test_a_refusal_of_the_hub_is_told_without_the_token(some_runs, monkeypatch, fake_hub, capsys):
    def refuse(self: Any, *words: Any, **told: Any) -> None:
        raise ValueError("401 for hf_SecretSecretSecret")

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    assert app.run(["export", str(some_runs["lora"]), "--push-to-hub", "someone/dog"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "401 for (hidden)" in said and "hf_Secret" not in said


@pytest.mark.parametrize("method", ["lora", "textual-inversion", "hypernetwork", "dreambooth"])
def test_the_card_says_how_each_program_loads_it(some_runs, tmp_path, method):
    assert app.run(["export", str(some_runs[method]), "--card", str(tmp_path / "README.md")]) == 0
    said = (tmp_path / "README.md").read_text()
    head = said.split("---\n")[1]
    trigger = runs.read_json(some_runs[method] / "artifact" / "artifact.json")["trigger"]
    assert 'license: "other"' in head and f'instance_prompt: "{trigger}"' in head  # a tiny random base is of no published family
    assert f"`{trigger}`" in said and "## Training" in said and "## Licence" in said and "look it up" in said
    wanted = {"lora": ["load_lora_weights", "<lora:sks-dog:1>", "Load LoRA node"], "textual-inversion": ["load_textual_inversion", "embedding:my-dog"],
              "hypernetwork": ["<hypernet:sks-dog:1>", "Hypernetwork Loader"], "dreambooth": ["from_pretrained('OWNER/NAME')", "models/Stable-diffusion"]}
    assert all(part in said for part in wanted[method]) and str(some_runs[method].parent) not in said


def test_a_card_quotes_what_people_write(some_runs, tmp_path):
    run = tmp_path / "lora"
    shutil.copytree(some_runs["lora"], run)
    told = runs.read_json(run / "artifact" / "artifact.json")
    runs.write_json(run / "artifact" / "artifact.json", {**told, "subject": "<img src=x>|", "trigger": 'a "`b`"'})
    said = hub.card(hub.read(run), "someone/dog")
    assert "<img src=x>" not in said.replace("\\<", "") and 'instance_prompt: "a \\"`b`\\""' in said and "`a \"'b'\"`" in said
