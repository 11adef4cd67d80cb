"""Wrong inputs through the command line: exit code 2, one block with what, why and what to do, no traceback; --debug shows it.

What is here is not tested elsewhere: test_cli_failures.py, test_training_refusals.py and test_data_intake.py have the rest.
"""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import app, failures


def told(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("Problem: ") and "Traceback" not in text and text.count("Problem: ") == 1
    assert "Fix: " in text or "Why: " in text
    return " ".join(text.split())


def train(model: Any, pictures: Any, output: Path, *more: str) -> int:
    return app.run(["lora", "--model", str(model), "--instance-dir", str(pictures), "--class-noun", "backpack", "--resolution", "32", "--batch-size", "1",
                    "--steps", "1", "--validate-every", "0", "--memory", "fast", "--output", str(output), *more])


def merged(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def lie(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**61) + path.read_bytes()[8:])


UNET = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "lacks scheduler."),
    "no scheduler file": (lambda folder: (folder / SCHEDULER).unlink(), "lacks scheduler/scheduler_config.json."),
    "scheduler cut off": (lambda folder: (folder / SCHEDULER).write_text("{"), "scheduler_config.json cannot be read."),
    "scheduler no object": (lambda folder: (folder / SCHEDULER).write_text("[]"), "is no JSON object. Why: It holds a list."),
    "no schedule": (lambda folder: (folder / SCHEDULER).write_text("{}"), "does not say beta_start, beta_end, beta_schedule."),
    "another schedule": (lambda folder: merged(folder / SCHEDULER, beta_schedule="squaredcos_cap_v2"), "unknown beta schedule 'squaredcos_cap_v2'"),
    "another prediction": (lambda folder: merged(folder / SCHEDULER, prediction_type="sample"), "predicts 'sample'."),
    "no vocabulary": (lambda folder: [path.unlink() for path in (folder / "tokenizer").iterdir()], "lacks tokenizer/vocab.json."),
    "no weights": (lambda folder: (folder / UNET).unlink(), f"lacks {UNET}."),
    "weights cut off": (lambda folder: cut(folder / "text_encoder" / "model.safetensors"), "cannot be loaded."),
    "a lying header": (lambda folder: lie(folder / UNET), "it claims a header of 2,305,843,009,213,693,952 bytes"),
    "unet not UTF-8": (lambda folder: (folder / "unet" / "config.json").write_bytes(b"\xff\xfe"), "unet/config.json cannot be read."),
    "unet of another size": (lambda folder: merged(folder / "unet" / "config.json", block_out_channels=[64, 128]), "the configuration says"),
    "unet without a size": (lambda folder: merged(folder / "unet" / "config.json", sample_size=None), "does not say its picture size."),
    "channels no number": (lambda folder: merged(folder / "unet" / "config.json", in_channels=[4]), "takes [4] latent channels."),
    "a shard elsewhere": (lambda folder: (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": "/etc/passwd"}}'), "leads out of its folder."),
    "an index cut off": (lambda folder: (folder / f"{UNET}.index.json").write_text("{"), "index.json is damaged."),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_folders(name: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, said = MODELS[name]
    shutil.copytree(tiny_model, tmp_path / "model")
    spoil(tmp_path / "model")
    assert train(tmp_path / "model", pictures_dir, tmp_path / "run") == 2
    assert said in told(capsys)


def test_a_text_encoder_of_another_width(tiny_model: Path, make_model: Callable[..., Path], pictures_dir: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    shutil.copytree(make_model(width=64) / "text_encoder", tmp_path / "model" / "text_encoder")
    assert train(tmp_path / "model", pictures_dir, tmp_path / "run") == 2
    assert "gives states 64 wide, its UNet takes 48." in told(capsys)


@pytest.mark.parametrize("method", ["dreambooth"])  # test_cli_end_to_end.py has the other three
def test_artifacts_of_another_width(method: str, tiny_model: Path, make_model: Callable[..., Path], pictures_dir: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    words = [method, "--model", str(tiny_model), "--instance-dir", str(pictures_dir), "--class-noun", "backpack", "--resolution", "32", "--batch-size", "1",
             "--steps", "1", "--validate-every", "0", "--memory", "fast", "--prior", "none", "--output", str(tmp_path / "run")]
    assert app.run(words) == 0
    capsys.readouterr()
    assert app.run(["generate", "--model", str(make_model(width=64)), "--artifact", str(tmp_path / "run"), "--prompt", "x", "--output", str(tmp_path / "out")]) == 2
    text = told(capsys)
    assert "does not fit" in text or "48 wide" in text


@pytest.mark.parametrize(("recipe", "said"), [
    ("learning_rte = 1", "Unknown setting 'learning_rte' in recipe"), ("rank = 'x'", "--rank does not accept 'x'."), ("[a]\nb = 1", "Unknown setting 'a'"),
    ("model = 5", "--model does not accept 5."), ("steps = -1", "--steps does not accept -1."), ("method = 'lroa'", "is for 'lroa', not for 'lora'."),
])
def test_recipes(recipe: str, said: str, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(recipe)
    assert app.run(["lora", "--recipe", str(tmp_path / "r.toml"), "--class-noun", "dog", "--instance-dir", str(pictures_dir), "--output", str(tmp_path / "run")]) == 2
    text = told(capsys)
    assert said in text and ("Did you mean 'learning_rate'?" in text) == ("rte" in recipe)


@pytest.mark.parametrize(("flags", "said"), [
    (["--rank", "1000"], "--rank 1000 is larger than the narrowest chosen layer, which is 32 wide."), (["--device", "meta"], "There is no device 'meta' here."), (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a GPU."),
    (["--model", "x" * 300], "There is no base model at"), (["--model", "nobody/nothing"], "is not in the local cache."),
])
def test_flags(flags: list[str], said: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_model, pictures_dir, tmp_path / "run", *flags) == 2
    assert said in told(capsys)


# -- the network ---------------------------------------------------------------------------------------------------------


def test_hub_names_without_a_network_are_refused_at_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody answers at the hub's address. Asked for a data set the library alone would wait 23 seconds between its tries."""
    import time

    import datasets
    from huggingface_hub import constants

    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for place, name, value in ((constants, "HF_HUB_OFFLINE", False), (datasets.config, "HF_HUB_OFFLINE", False), (constants, "ENDPOINT", "http://127.0.0.1:9"),
                               (datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")):
        monkeypatch.setattr(place, name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    words = ["lora", "--class-noun", "dog", "--resolution", "32", "--output", str(tmp_path / "run")]
    assert app.run([*words, "--model", str(tiny_model), "--dataset", "nobody/nothing"]) == 2
    assert "--dataset nobody/nothing cannot be loaded." in told(capsys)
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)  # as it was
    assert app.run([*words, "--model", "nobody/nothing", "--instance-dir", "."]) == 2
    assert "The hub model 'nobody/nothing' cannot be had." in told(capsys)
    assert sum(waited) < 3


@pytest.mark.parametrize("name", ["json", "imagefolder", "parquet"])
def test_readers_of_the_library_are_no_data_sets(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """The library would read whatever lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    assert app.run(["lora", "--class-noun", "dog", "--model", str(tiny_model), "--resolution", "32", "--dataset", name, "--output", str(tmp_path / "run")]) == 2
    assert f"--dataset {name} is no data set." in told(capsys)


# -- disks and names -----------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be(tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for output, said in ((tmp_path / "file" / "run", "A file is there where a folder is wanted"), (tmp_path / ("n" * 300), "Choose a shorter name."),
                         (Path("/proc/run"), "/proc/run cannot be opened or written.")):
        assert train(tiny_model, pictures_dir, output) == 2
        assert said in told(capsys)


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "Its disk is read-only: choose another folder"), (errno.EACCES, "Check its permissions"),
                                              (errno.ENOSPC, "Make room on that disk"), (errno.EMFILE, "ulimit -n"), (errno.EIO, "may be failing")])
def test_what_the_system_refuses(number: int, said: str, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    import os

    import finetune.training

    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "run"))

    monkeypatch.setattr(finetune.training, "train", refuse)
    assert train(tiny_model, pictures_dir, tmp_path / "run") == 2
    text = told(capsys)
    assert said in text and os.strerror(number) in text
    assert train(tiny_model, pictures_dir, tmp_path / "run", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_spaces_signs_and_unicode_everywhere(tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "mein Ördner 猫 'x' [y]"
    shutil.copytree(tiny_model, place / "my model")
    shutil.copytree(pictures_dir, place / "my pictures")
    (place / "my pictures" / "picture-0.txt").write_bytes("grün".encode("latin-1"))  # not UTF-8: noted, and the template is used
    assert train(place / "my model", place / "my pictures", place / "the run", "--subject", "mein rücksack 猫") == 0
    assert "picture-0.txt is not UTF-8" in " ".join(capsys.readouterr().out.split())
    assert app.run(["generate", "--model", str(place / "my model"), "--artifact", str(place / "the run"), "--prompt", "mein rücksack 猫", "--steps", "1",
                    "--output", str(place / "out 猫")]) == 0
    assert len(list((place / "out 猫").glob("*.png"))) == 1


def test_texts_that_are_no_unicode(tiny_model: Path, pictures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal in Latin-1 hands over bytes that are no UTF-8."""
    assert train(tiny_model, pictures_dir, tmp_path / "run", "--class-noun", "gr\udcfcn") == 2
    assert "is not Unicode." in told(capsys)
    assert app.run(["generate", "--model", str(tiny_model), "--prompt", "gr\udcfcn", "--steps", "1", "--output", str(tmp_path / "out")]) == 2
    assert "The prompt 'gr?n' is not Unicode text." in told(capsys)


def test_messages_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failures.block([("Problem", "tensor '\x1b[2J\x07' is odd")])
    assert capsys.readouterr().err == "Problem: tensor '\ufffd[2J\ufffd' is odd\n"


@pytest.mark.parametrize("content", ["[]", "null", '{"metadata": 5, "files": 3, "trigger": ["x"]}', '{"files": [{"file": "../../secret"}, 7]}', "{"])
def test_inspect_takes_any_artifact_json(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "a" / "b" / "artifact.json").write_text(content)
    assert app.run(["inspect", str(tmp_path / "a" / "b")]) == 0
    assert ("leads out of its folder" in " ".join(capsys.readouterr().out.split())) == ("secret" in content)
