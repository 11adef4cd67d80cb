"""Words and predictions that do not fit the model, refused by the command line before a step is taken."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli import app
from finetune.errors import Problem
from finetune.model import configs, words


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CLIP's own tokenizer, which the package carries."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    configs.write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize(("word", "reads"), [("mydog", "my and dog"), ("mybag", "my and bag"), ("<mydog>", ""), ("ohwx", ""), ("zwxq", ""), ("my-dog", "")])
def test_a_placeholder_of_known_words(word: str, reads: str, clip: Any) -> None:
    base: Any = SimpleNamespace(encoders=lambda: [("text_encoder", None, clip)])
    if not reads:
        words.check_placeholder(base, word)
        return
    with pytest.raises(Problem, match=f"reads as the words {reads} to this model.*'<{word}>'"):
        words.check_placeholder(base, word)


@pytest.mark.parametrize(("initializer", "known"), [("dog", True), ("small red dog", True), ("pikachu", True), ("shiba-inu", True), ("capybara", True),
                                                    ("qwzxqy", False), ("猫", False), (" ", False), ("red qwzxqy", False)])
def test_an_initializer_the_model_only_spells(initializer: str, known: bool, clip: Any) -> None:
    if known:
        words.check_initializer(clip, initializer)
        return
    with pytest.raises(Problem, match="is unknown to this model"):
        words.check_initializer(clip, initializer)


def run(tiny_model: Path, pictures_dir: Path, tmp_path: Path, method: str, *more: str, model: Path | None = None) -> int:
    return app.run([method, "--model", str(model or tiny_model), "--instance-dir", str(pictures_dir), "--class-noun", "backpack", "--resolution", "32",
                    "--batch-size", "1", "--steps", "1", "--validate-every", "0", "--memory", "fast", "--output", str(tmp_path / "run"), *more])


@pytest.mark.parametrize(("method", "more", "said"), [
    ("textual-inversion", ["--initializer", "qwzxqy"], "The initializer 'qwzxqy' is unknown to this model. Why: Its tokenizer spells it: q w z x q y."),
    ("lora", ["--instance-prompt", "a photo of a {} " + "red " * 40], "--instance-prompt has 46 tokens; this model reads 30."),
    ("dreambooth", ["--prior", "images", "--class-prompt", "red " * 40], "--class-prompt has 40 tokens; this model reads 30."),
    ("lora", ["--preview-prompt", "red " * 40], "--preview-prompt has 40 tokens"),
    ("lora", ["--text-encoder-rank", "1000"], "--text-encoder-rank 1000 is larger than the layers of the text_encoder, which are 48 wide."),
    ("lora", ["--rank", "1000"], "--rank 1000 is larger than the narrowest chosen layer, which is 32 wide."),
])
def test_refused_before_the_first_step(method: str, more: list[str], said: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_model, pictures_dir, tmp_path, method, *more) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("Problem: ") and said in told and "Fix: " in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "artifact").exists()


@pytest.mark.parametrize("recipe", ["steps = " + "9" * 5000, "a = " + "[" * 5000])
def test_recipes_that_broke_the_parser(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(recipe)
    assert app.run(["lora", "--recipe", str(tmp_path / "r.toml"), "--class-noun", "dog"]) == 2
    assert "is not valid TOML" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "null", '{"metadata": 5}'])
def test_any_json_in_a_run(content: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of a stranger's run: export reads its artifact.json, --resume its manifest."""
    assert run(tiny_model, pictures_dir, tmp_path, "lora") == 0
    (tmp_path / "run" / "artifact" / "artifact.json").write_text(content)
    assert app.run(["export", str(tmp_path / "run"), "--to", "webui", "--output", str(tmp_path / "out")]) == 0
    (tmp_path / "run" / "manifest.json").write_text(content)
    assert run(tiny_model, pictures_dir, tmp_path, "lora", "--resume") in (0, 2)
    assert "Error: " not in capsys.readouterr().err


def test_an_artifact_of_another_prediction(tiny_model: Path, tiny_v_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_v_model, pictures_dir, tmp_path, "lora") == 0
    words_of = ["generate", "--artifact", str(tmp_path / "run"), "--prompt", "x", "--steps", "1", "--output", str(tmp_path / "pictures"), "--model"]
    capsys.readouterr()
    assert app.run([*words_of, str(tiny_model)]) == 2
    assert "was trained on a model that predicts v_prediction;" in " ".join(capsys.readouterr().err.split())
    assert app.run([*words_of, str(tiny_v_model)]) == 0


def test_what_says_nothing_of_its_prediction_is_taken() -> None:
    base: Any = SimpleNamespace(prediction="epsilon", name="base")
    for told in ({}, {"modelspec.prediction_type": "epsilon"}, {"modelspec.prediction_type": json.dumps("odd")}):
        words.check_prediction(base, told, "file")
    with pytest.raises(Problem, match="predicts v_prediction"):
        words.check_prediction(base, {"modelspec.prediction_type": "v"}, "file")
