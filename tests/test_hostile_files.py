"""No file runs code: a pickle that would leave a mark, in each place where a file is read. And no name leaves its folder."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune import runs
from finetune.cli import app

MARK: list[Path] = []


class Payload:
    """Unpickling it writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (MARK[0], "code ran")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that the payload would write. That it does is tried first, so that its absence means something."""
    MARK[:] = [tmp_path / "mark"]
    pickle.loads(pickle.dumps(Payload()))
    assert MARK[0].read_text() == "code ran"
    MARK[0].unlink()
    return MARK[0]


def plain() -> bytes:
    return pickle.dumps({"string_to_param": {"*": Payload()}, "state_dict": Payload(), 768: (Payload(), Payload())}, protocol=2)


def legacy() -> bytes:
    """torch's old container: three pickles before the one that counts."""
    from finetune.formats.pickles import MAGIC, PROTOCOL, SYSTEM

    return b"".join(pickle.dumps(part, protocol=2) for part in (MAGIC, PROTOCOL, SYSTEM)) + plain() + pickle.dumps([], protocol=2)


def zipped() -> bytes:
    """torch's new container."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", plain())
        archive.writestr("archive/version", "3\n")
    return target.getvalue()


def computed() -> bytes:
    """The name of the function is put together on the pickle's stack and kept in its memo, so that no opcode shows it."""
    return b"\x80\x04\x8c\x02po\x94\x8c\x05posix\x94\x8c\x06system\x94h\x01h\x02\x93\x8c" + bytes([len(command())]) + command() + b"\x85R."


def command() -> bytes:
    return f"touch {MARK[0]}".encode()[:255]


KINDS: dict[str, Callable[[], bytes]] = {"plain": plain, "legacy": legacy, "zip": zipped, "computed": computed}


def refused(mark: Path, *words: Any) -> None:
    """The command ends with code 2 and the payload has not run."""
    assert app.run([str(word) for word in words]) == 2
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["artifact.pt", "embedding.bin", "hypernetwork.pt", "lora.pt", "lora.safetensors", "model.ckpt", "model.safetensors"])
def test_artifacts_and_models(kind: str, name: str, tiny_model: Path, tmp_path: Path, mark: Path) -> None:
    """generate (as a file, in a folder, as the base), convert and inspect."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / name).write_bytes(KINDS[kind]())
    if kind == "zip" or name == "artifact.pt":  # one reader for all: each name and each kind is tried, not each pair
        rendered = ("generate", "--model", tiny_model, "--prompt", "x", "--output", tmp_path / "pictures")
        refused(mark, *rendered, "--artifact", folder / name)
        refused(mark, *rendered, "--artifact", folder)
    refused(mark, "generate", "--model", folder / name, "--prompt", "x", "--output", tmp_path / "pictures")
    refused(mark, "convert", folder / name, "--to", "single-file", "--output", tmp_path / "converted.safetensors")
    assert app.run(["inspect", str(folder / name)]) in (0, 2) and not mark.exists()
    assert app.run(["inspect", str(folder / name), "--check"]) in (0, 1, 2) and not mark.exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_of_a_model_folder(part: str, tiny_model: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = next((folder / part).glob("*.safetensors"))
    weights.unlink()
    pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (folder / part / pickled).write_bytes(zipped())
    refused(mark, "generate", "--model", folder, "--prompt", "x", "--output", tmp_path / "pictures")
    assert f"{part}/{pickled} can run code when opened" in " ".join(capsys.readouterr().err.split())


def test_checkpoint_and_resume_state(tiny_model: Path, pictures_dir: Path, tmp_path: Path, mark: Path) -> None:
    """Even with a manifest that vouches for it."""
    words = ["lora", "--model", tiny_model, "--instance-dir", pictures_dir, "--class-noun", "backpack", "--resolution", 32, "--batch-size", 1, "--steps", 2,
             "--checkpoint-every", 1, "--validate-every", 0, "--memory", "fast", "--output", tmp_path / "run"]
    assert app.run([str(word) for word in words]) == 0
    kept = sorted((tmp_path / "run" / "checkpoints").glob("*/manifest.json"))[-1].parent
    whole = {path.name: path.read_bytes() for path in kept.iterdir()}
    for name, kind in (("trained.safetensors", zipped), ("optimizer.safetensors", legacy), ("manifest.json", plain)):
        (kept / name).write_bytes(kind())
        if name != "manifest.json":
            told = runs.read_json(kept / "manifest.json")
            (kept / "manifest.json").write_text(json.dumps(told | {"files": told["files"] | {name: runs.sha256(kept / name)}}))
        refused(mark, *words, "--resume", "--steps", 3)
        for old, content in whole.items():
            (kept / old).write_bytes(content)
    assert app.run([str(word) for word in words] + ["--resume", "--steps", "3"]) == 0


@pytest.mark.parametrize("name", ["settings.json", "manifest.json", "artifact/artifact.json", "comparison.json"])
def test_files_of_a_run_and_a_comparison(name: str, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "run"
    (folder / "artifact").mkdir(parents=True)
    for other in ("settings.json", "manifest.json", "artifact/artifact.json"):
        (folder / other).write_text("{}")
    (folder / name).write_bytes(plain())
    for words in (("report", folder), ("evaluate", folder), ("generate", "--artifact", folder, "--prompt", "x"), ("export", folder, "--to", "webui", "--output", tmp_path / "out")):
        refused(mark, *words)
    assert app.run(["inspect", str(folder)]) in (0, 2) and not mark.exists()


def test_recipe_prompts_and_pictures(tiny_model: Path, tmp_path: Path, mark: Path) -> None:
    for number, kind in enumerate(KINDS.values()):
        (tmp_path / f"{number}.toml").write_bytes(kind())
        refused(mark, "lora", "--recipe", tmp_path / f"{number}.toml", "--class-noun", "dog")
        refused(mark, "generate", "--model", tiny_model, "--prompts-file", tmp_path / f"{number}.toml")
        (tmp_path / f"{number}.png").write_bytes(kind())
        refused(mark, "generate", "--model", tiny_model, "--like", tmp_path / f"{number}.png")
        refused(mark, "generate", "--model", tiny_model, "--prompt", "x", "--init-image", tmp_path / f"{number}.png")


def test_folders_of_pictures_and_data_sets(tiny_model: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import numpy as np

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.pkl", "a.png", "a.txt", "metadata.csv", "metadata.jsonl", "data.pth", "dataset_infos.json", "data.py"):
        (folder / name).write_bytes(plain())
    np.save(folder / "b.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    (folder / "data.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).write_text('code ran')\n")
    for flag in ("--instance-dir", "--dataset"):
        refused(mark, "lora", "--model", tiny_model, "--class-noun", "dog", "--resolution", 32, flag, folder, "--output", tmp_path / "run")
    alone = tmp_path / "frames"
    alone.mkdir()
    (alone / "a.pkl").write_bytes(plain())
    (alone / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.pkl\n---\n")
    refused(mark, "lora", "--model", tiny_model, "--class-noun", "dog", "--resolution", 32, "--dataset", alone, "--output", tmp_path / "run")


# -- names ---------------------------------------------------------------------------------------------------------------

OUTSIDE = ["../secret", "../../secret.safetensors", "/etc/passwd", "~/secret", "a/../../secret", "..\\secret", "\\\\server\\share", "a\nb", ".", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_prompts_stay_in_the_folder(name: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    refused(tmp_path / "none", "generate", "--model", tiny_model, "--artifacts-dir", folder, "--prompt", f"a <lora:{name}:1>", "--output", tmp_path / "out")
    assert "is no name of an artifact" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/hostname", "https://example.com/a.parquet"])
def test_a_data_set_names_only_its_own_files(outside: str, tiny_model: Path, tmp_path: Path, pictures_dir: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copy(pictures_dir / "picture-0.png", tmp_path / "secret.png")
    folder = tmp_path / "data"
    folder.mkdir()
    words = ("lora", "--model", tiny_model, "--class-noun", "dog", "--resolution", 32, "--dataset", folder, "--output", tmp_path / "run")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {outside}\n---\n")
    refused(tmp_path / "none", *words)
    (folder / "README.md").unlink()
    shutil.copy(pictures_dir / "picture-1.png", folder / "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": outside, "text": "x"}) + "\n")
    refused(tmp_path / "none", *words)
    (folder / "metadata.jsonl").unlink()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": outside}]}))
    refused(tmp_path / "none", *words)
    assert "is not in it" in " ".join(capsys.readouterr().err.split())


def test_an_index_of_weights_stays_in_its_folder(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sharded model names its files in a JSON index."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere.safetensors")
    names = list(finetune_header(tmp_path / "elsewhere.safetensors"))
    (folder / "unet" / f"{weights.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../../elsewhere.safetensors")}))
    for words in (("generate", "--model", folder, "--prompt", "x", "--output", tmp_path / "out"),
                  ("convert", folder, "--to", "single-file", "--output", tmp_path / "a.safetensors")):
        refused(tmp_path / "none", *words)
        assert "leads out of" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("config", "said"), [
    ({"r": 2, "rank_pattern": {"(a+)+$": 4}}, "a pattern that may never end"), ({"r": 2, "alpha_pattern": {"a" * 501: 4}}, "a pattern that may never end"),
    ({"r": "x"}, "does not describe the adapter"), ({"r": 0}, "does not describe the adapter"), ([], "is damaged"), ("{", "is damaged"),
    ({"r": 2, "num_cayley_neumann_terms": 10**9}, "1000000000 terms"),
])
def test_a_strangers_peft_configuration(config: Any, said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "adapter" / "unet"
    folder.mkdir(parents=True)
    place = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{place}.lora_A.weight": torch.ones(2, 48), f"{place}.lora_B.weight": torch.ones(32, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    refused(tmp_path / "none", "generate", "--model", tiny_model, "--artifact", folder.parent, "--prompt", "x", "--output", tmp_path / "out")
    assert said in " ".join(capsys.readouterr().err.split())


def finetune_header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8:8 + struct.unpack("<Q", content[:8])[0]])


def test_remote_code_is_never_trusted() -> None:
    """No call in the sources passes trust_remote_code, and no torch.load or numpy.load asks for pickles."""
    sources = sorted(Path(finetune.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert "trust_remote_code" not in keywords, source
            name = ast.unparse(node.func)
            if name == "torch.load":
                assert isinstance(keywords.get("weights_only"), ast.Constant) and keywords["weights_only"].value is True, source
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "eval", "exec", "yaml.load"), f"{source}: {name}"
            assert not (name in ("np.load", "numpy.load") and "allow_pickle" in keywords), source
