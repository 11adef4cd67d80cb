"""Whole runs: full disks, two of them in one folder, signals at every stage, kills, and what the next start finds."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from finetune import methods, runs
from finetune.errors import Problem
from finetune.runs import durable
from finetune.training import artifacts, checkpoint, space, train
from finetune.training import run as run_room

ROOT = Path(runs.__file__).resolve().parent.parent.parent


def settings(tiny: Path, pictures: Path, output: Path, name: str = "lora", **more: Any) -> Any:
    given = {"model": str(tiny), "instance_dir": pictures, "class_noun": "backpack", "resolution": 32, "batch_size": 1, "steps": 3, "output": output,
             "validate_every": 0, "log_every": 1, "checkpoint_every": 1, **({"rank": 2} if name == "lora" else {})}
    return methods.get(name).Settings(**(given | more))


def silent() -> Console:
    return Console(file=open(os.devnull, "w"), width=80)  # noqa: SIM115 - lives as long as the console


def hashes(folder: Path) -> dict[str, str]:
    return {entry["file"]: entry["sha256"] for entry in runs.read_json(folder / "artifact" / "artifact.json")["files"]}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, pictures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    return train(settings(tiny_model, pictures_dir, tmp_path_factory.mktemp("whole") / "run"), silent())


@contextlib.contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, free: Any) -> Iterator[None]:
    """A disk with `free()` bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=free(), f_frsize=1, f_blocks=1))
        yield


def test_room_is_asked_for_before_the_first_step(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path):
    monkeypatch.setattr(run_room, "fit", lambda *given: pytest.fail("a step was taken"))
    with disk(monkeypatch, lambda: 100_000), pytest.raises(runs.DiskFull, match=r"100,000 bytes are free, and [\d,]+ bytes are needed for .*/run\."):
        train(settings(tiny_model, pictures_dir, tmp_path / "run"), silent())
    assert runs.read_json(tmp_path / "run" / "manifest.json")["status"] == "failed" and not (tmp_path / "run" / "checkpoints").exists()


def test_the_predicted_bytes_are_those_of_the_files(whole: Path, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    predicted: list[int] = []
    real = space.check
    monkeypatch.setattr(space, "check", lambda folder, given, method, base, state, count: (
        predicted.append(space.checkpoint_bytes(state)), real(folder, given, method, base, state, count)))
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run", steps=2), silent())
    kept = runs.checkpoints(folder)[-1]
    written = sum((kept / name).stat().st_size for name in ("trained.safetensors", "optimizer.safetensors"))
    assert predicted == [written + checkpoint.MANIFEST] and (kept / "manifest.json").stat().st_size < checkpoint.MANIFEST
    sizes = sum(path.stat().st_size for path in (folder / "artifact").rglob("*"))
    assert sizes < runs.read_json(folder / "manifest.json")["artifact"]["bytes"] + artifacts.HEADERS


@pytest.mark.parametrize("when", ["asked before the save", "in the middle of the save"])
def test_a_full_disk_keeps_the_last_checkpoint_and_goes_on(whole: Path, tiny_model: Path, pictures_dir: Path, tmp_path: Path, when: str,
                                                           monkeypatch: pytest.MonkeyPatch):
    folder, real, full = tmp_path / "run", checkpoint.stream.save, []

    def save(path: Path, *given: Any, **more: Any) -> None:
        if full and when.startswith("in"):
            path.write_bytes(b"x" * 1000)
            raise OSError(28, "No space left on device")
        real(path, *given, **more)
        if "0000002" in str(path) and path.name.startswith("optimizer"):
            full.append(1)  # from the third on there is no room

    with monkeypatch.context() as patch, disk(monkeypatch, lambda: 5_000 if full and when.startswith("asked") else 10**12):
        patch.setattr(checkpoint.stream, "save", save)
        with pytest.raises(runs.DiskFull) as found:
            train(settings(tiny_model, pictures_dir, folder), silent())
    assert found.value.needed and found.value.needed > 5_000 and "0000003" in str(found.value.path) and f"{found.value.needed:,} bytes" in str(found.value) \
        or when.startswith("in") and "0000003" in str(found.value)
    assert [path.name for path in runs.checkpoints(folder)] == ["0000002"] and not list(folder.rglob("*.part*"))
    manifest = runs.read_json(folder / "manifest.json")
    assert manifest["status"] == "failed" and "disk is full" in manifest["reason"]
    train(settings(tiny_model, pictures_dir, folder, resume=True), silent())
    assert hashes(folder) == hashes(whole)


def test_an_artifact_that_comes_back_wrong_leaves_the_old_one(whole: Path, tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run"), silent())
    before, real = hashes(folder), durable.sync_file

    def flipped(path: Path) -> None:
        if path.name.startswith(".sks") and path.stat().st_size:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        real(path)

    monkeypatch.setattr(durable, "sync_file", flipped)
    with pytest.raises(Problem, match="did not come back from the disk as it was written"):
        train(settings(tiny_model, pictures_dir, folder, steps=4, resume=True), silent())
    assert hashes(folder) == before and not list(folder.rglob("*.part*"))
    for entry, digest in before.items():
        assert runs.sha256(folder / "artifact" / entry) == digest


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "safetensors"), ("a.json", b"{", "cannot be read back"), ("a.pt", b"cos\nsystem\n.", "a.pt")])
def test_reading_back_finds_what_no_reader_would_read(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Problem, match=words):
        artifacts._read_back(tmp_path / name)


# -- two in one folder ------------------------------------------------------------------------------------------------------

def test_a_second_run_into_the_folder_is_refused(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, said = run_room.fit, []

    def meanwhile(*given: Any) -> Any:
        for progress in real(*given):
            if progress.step == 1:
                for more in ({"resume": True}, {"overwrite": True}, {}):
                    with pytest.raises(Problem, match=rf"Another process works in .*run: process {os.getpid()} since .* UTC") as found:
                        train(settings(tiny_model, pictures_dir, tmp_path / "run", **more), silent())
                    said.append(str(found.value))
            yield progress

    monkeypatch.setattr(run_room, "fit", meanwhile)
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run"), silent())
    assert len(said) == 3 and runs.read_json(folder / "manifest.json")["status"] == "finished"
    assert len(runs.read_metrics(folder)) == 3
    with runs.locked(folder):
        assert (folder / ".lock").is_file()


def test_evaluate_and_compare_refuse_a_folder_at_work(tmp_path: Path):
    from finetune.cli import compare, evaluate
    from finetune.cli.compare_settings import CompareSettings

    runs.write_json(tmp_path / "comparison.json", {})
    with runs.locked(tmp_path):
        with pytest.raises(Problem, match="Another process works"):
            evaluate.run(evaluate.Settings(folder=tmp_path), silent())
        with pytest.raises(Problem, match="Another process works"):
            compare.run(CompareSettings(output=tmp_path, class_noun="dog"), silent())
    (tmp_path / f".scores.{durable._host()}-999999999-00000000.part.json").touch()
    with contextlib.suppress(Problem), runs.locked(tmp_path / "other"):
        compare.run(CompareSettings(output=tmp_path, class_noun="dog", instance_dir=tmp_path), silent())
    assert not list(tmp_path.glob(".scores*"))


# -- signals ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_an_artifact(whole: Path, tiny_model: Path, pictures_dir: Path, tmp_path: Path, number: int,
                                                      monkeypatch: pytest.MonkeyPatch):
    real, before = run_room.fit, signal.getsignal(number)

    def interrupted(*given: Any) -> Any:
        for progress in real(*given):
            if progress.step == 2:
                os.kill(os.getpid(), number)
            yield progress

    monkeypatch.setattr(run_room, "fit", interrupted)
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run", checkpoint_every=0), silent())
    assert signal.getsignal(number) is before
    assert runs.read_json(folder / "manifest.json")["status"] == "interrupted" and [path.name for path in runs.checkpoints(folder)] == ["0000002"]
    assert runs.read_json(folder / "artifact" / "artifact.json")["step"] == 2
    monkeypatch.setattr(run_room, "fit", real)
    assert hashes(folder).keys() == hashes(whole).keys() and hashes(folder) != hashes(whole)
    train(settings(tiny_model, pictures_dir, folder, checkpoint_every=0, resume=True), silent())
    assert hashes(folder) == hashes(whole)


def test_a_second_signal_ends_at_once_and_harms_nothing(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = checkpoint.stream.save
    seen = []

    def save(path: Path, *given: Any, **more: Any) -> None:
        seen.append(path)
        if len(seen) in (3, 4):  # in the second checkpoint: one is noted, one ends it
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, *given, **more)

    monkeypatch.setattr(checkpoint.stream, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny_model, pictures_dir, tmp_path / "run"), silent())
    folder = tmp_path / "run"
    assert len(seen) == 4 and [path.name for path in runs.checkpoints(folder)] == ["0000001"] and not list(folder.rglob("*.part*"))
    assert runs.read_json(folder / "manifest.json")["status"] == "failed"


@pytest.mark.parametrize(("stage", "number"), [("class pictures", signal.SIGTERM), ("encoding", signal.SIGINT)])
def test_a_signal_before_the_first_step_ends_cleanly(tiny_model: Path, pictures_dir: Path, tmp_path: Path, stage: str, number: int,
                                                    monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))

    def draw(base: Any, prompts: list[str], seeds: list[int], **more: Any) -> list[Image.Image]:
        if stage == "class pictures":
            os.kill(os.getpid(), number)
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    monkeypatch.setattr(run_room, "render", draw)
    if stage == "encoding":
        monkeypatch.setattr(run_room, "_encode_prompts", lambda *given: os.kill(os.getpid(), number))
    given = {"prior": "images", "class_images": 2, "class_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny_model, pictures_dir, tmp_path / "run", "dreambooth", **given), silent())
    folder = tmp_path / "run"
    assert runs.read_json(folder / "manifest.json") | {"status": "failed", "reason": "KeyboardInterrupt"} == runs.read_json(folder / "manifest.json")
    assert not list(tmp_path.rglob("*.part*")) and len(list((tmp_path / "cache").rglob("*.png"))) == (0 if stage == "class pictures" else 2)
    said = Console(record=True, width=200)
    monkeypatch.undo()
    train(settings(tiny_model, pictures_dir, folder, "textual-inversion", resume=True, steps=1), said)  # there was no checkpoint: it begins anew
    assert "ended before its first checkpoint: it begins anew" in said.export_text() and runs.read_json(folder / "manifest.json")["status"] == "finished"


def test_outside_the_main_thread_signals_are_left_alone(tiny_model: Path, pictures_dir: Path, tmp_path: Path):
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(train(settings(tiny_model, pictures_dir, tmp_path / "run", steps=1), silent())))
    thread.start()
    thread.join()
    assert found and signal.getsignal(signal.SIGTERM) is before


# -- what the next start finds ------------------------------------------------------------------------------------------------

def test_the_next_start_cleans_what_a_kill_left(whole: Path, tiny_model: Path, pictures_dir: Path, tmp_path: Path):
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run", keep_checkpoints=2), silent())
    token = f"{durable._host()}-1-0a1b2c3d.part"  # of a process that runs: number 1 always does
    half = folder / "checkpoints" / f".0000004.{token}"
    half.mkdir()
    (half / "manifest.json").write_text("{}", encoding="utf-8")  # complete but for its name: it does not count
    for stray in (folder / f".manifest.{token}.json", folder / f".artifact.{token}" / "a.safetensors", folder / "previews" / f".0000003-0.{token}.png"):
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_bytes(b"half")
    (folder / "artifact").rename(folder / ".artifact.old")  # where names cannot be exchanged in one step
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [path.name for path in runs.checkpoints(folder)] == ["0000002", "0000003"]
    train(settings(tiny_model, pictures_dir, folder, keep_checkpoints=2, resume=True), silent())
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"] and hashes(folder) == hashes(whole)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_lines_of_metrics_are_on_disk_before_the_checkpoint_is(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (told.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name), real(handle))[1])
    train(settings(tiny_model, pictures_dir, tmp_path / "run", steps=1, keep_checkpoints=1), silent())
    lines, done = told.index("metrics.jsonl"), told.index("checkpoints")
    assert lines < next(place for place, name in enumerate(told) if name.startswith(".trained")) and done


def test_kept_checkpoints_go_whole(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gone: list[Path] = []
    real = durable.shutil.rmtree
    monkeypatch.setattr(durable.shutil, "rmtree", lambda path, **more: (gone.append(Path(path)), real(path, **more))[1])
    folder = train(settings(tiny_model, pictures_dir, tmp_path / "run", keep_checkpoints=1), silent())
    assert [path.name for path in runs.checkpoints(folder)] == ["0000003"]
    assert all(durable.TEMPORARY.fullmatch(path.name) for path in gone) and {path.name[1:8] for path in gone} >= {"0000001", "0000002"}


def test_a_few_kills(tiny_model: Path, pictures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """benchmarks/kills.py in small: docs/reliability.md has what 200 kills gave."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["kills.py", "--kills", "3", "--steps", "2", "--methods", "textual-inversion", "--model", str(tiny_model),
                                      "--pictures", str(pictures_dir), "--resolution", "32", "--cache", str(tmp_path / "cache"),
                                      "--json", str(tmp_path / "kills.json")])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    try:
        importlib.import_module("kills").main()
    finally:
        torch.set_num_threads(threads)
    told = runs.read_json(tmp_path / "kills.json")
    assert told["methods"]["textual-inversion"]["kills"] == 3 and told["unreadable"] == told["different"] == 0


@pytest.mark.slow
def test_a_small_file_system_that_is_really_full(tmp_path: Path, tiny_model: Path, pictures_dir: Path):
    """Runs on a few MB of memory disk, which somebody else fills and clears again. Needs Linux and the right to mount one in a namespace of its own."""
    script = ROOT / "benchmarks" / "full_disk.py"
    words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, str(script), "--model", str(tiny_model), "--pictures", str(pictures_dir),
             "--resolution", "32"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0 and "went on to the same bytes" in done.stdout, done.stdout + done.stderr


def test_the_state_of_an_eight_bit_optimizer_is_saved_whole(tmp_path: Path):
    """Tensors that share their storage, empty ones and views are each written as they are."""
    shared = torch.arange(8.0)
    state = SimpleNamespace(step=1, parameters={"a": torch.nn.Parameter(shared[:4]), "b": torch.nn.Parameter(shared[4:])}, extra={"c": shared},
                            optimizer=SimpleNamespace(state_dict=lambda: {"state": {0: {"book": shared, "inner": {"x": shared.reshape(2, 4).T}}, 1: {"book": shared, "n": 3}}}))
    kept = checkpoint.save(tmp_path, state, {"rank": 1}, keep=1)
    found = runs.read_json(kept / "manifest.json")
    from safetensors.torch import load_file

    optimizer = load_file(kept / "optimizer.safetensors")
    assert torch.equal(optimizer["a/book"], shared) and torch.equal(optimizer["b/book"], shared) and torch.equal(optimizer["a/inner|x"], shared.reshape(2, 4).T)
    assert torch.equal(load_file(kept / "trained.safetensors")["extra/c"], shared) and found["optimizer"] == {"b/n": 3}
