"""Files and folders are there whole or not at all: killed at every operation, on a full disk, on a disk that lies, with the fsyncs in order."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune import runs
from finetune.errors import Problem
from finetune.formats import pickles, stream, tensors
from finetune.runs import durable, space

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def in_a_child(work: Callable[[], Any], operation: int) -> int:
    """Do the work in a process that is killed at the operation of that number (none: 0); its exit code."""
    child = os.fork()
    if child == 0:
        done = [0]

        def note(event: str, given: tuple[Any, ...]) -> None:
            if event in OPERATIONS:
                done[0] += 1
                if done[0] == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(note)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_folder(path: Path, text: str) -> None:
    with runs.atomic_folder(path) as fresh:
        (fresh / "inner").mkdir()
        for name in ("a.txt", "b.txt", "inner/c.txt"):
            (fresh / name).write_text(text)


def content(path: Path) -> set[str] | None:
    """Every text in the folder; None when there is no folder."""
    return {file.read_text() for file in path.rglob("*.txt")} | {str(len(list(path.rglob("*.txt"))))} if path.is_dir() else None


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "set aside"])
def test_a_folder_is_old_or_new_whenever_the_process_dies(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch):
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    path, seen, operation = tmp_path / "artifact", set(), 0
    while True:
        operation += 1
        durable.shutil.rmtree(path, ignore_errors=True)
        write_folder(path, "old")
        code = in_a_child(lambda: write_folder(path, "new"), operation)
        if exchange:
            assert content(path) in ({"old", "3"}, {"new", "3"}), operation  # at no moment is it missing or mixed
        runs.sweep(tmp_path, held=True)
        assert content(path) in ({"old", "3"}, {"new", "3"}), operation
        assert [one.name for one in tmp_path.iterdir()] == ["artifact"]
        seen |= content(path) or set()
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert operation > 12 and seen == {"old", "new", "3"}


def test_this_system_exchanges_names_in_one_step(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert durable._exchange(tmp_path / "a", tmp_path / "b") == (sys.platform in ("linux", "darwin"))
    assert (tmp_path / "a" / "b").exists() == (sys.platform in ("linux", "darwin"))


def test_a_file_is_old_or_new_whenever_the_process_dies(tmp_path: Path):
    path, seen, operation = tmp_path / "deep" / "manifest.json", set(), 0
    while True:
        operation += 1
        runs.write_json(path, {"which": "old"})
        code = in_a_child(lambda: runs.write_json(path, {"which": "new"}), operation)
        seen.add(runs.read_json(path)["which"])
        runs.sweep(tmp_path, held=True)
        assert [one.name for one in path.parent.iterdir()] == ["manifest.json"]
        if code == 0:
            break
    assert seen == {"old", "new"} and operation > 3


def test_a_removed_folder_is_never_half_there(tmp_path: Path):
    path, operation, code = tmp_path / "0000001", 0, 1
    while code:
        operation += 1
        if not path.is_dir():
            write_folder(path, "old")
        code = in_a_child(lambda: runs.remove_folder(path), operation)
        assert content(path) in ({"old", "3"}, None)
        runs.sweep(tmp_path, held=True)
        assert [one.name for one in tmp_path.iterdir()] in (["0000001"], [])
    assert operation > 3 and not path.exists()


def test_what_is_renamed_was_synced_and_then_its_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[tuple[str, str]] = []
    real_sync, real_replace, real_exchange, real_rename = os.fsync, os.replace, durable._exchange, Path.rename

    def name(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}").removeprefix(str(tmp_path))

    monkeypatch.setattr(os, "fsync", lambda handle: (told.append(("sync", name(handle))), real_sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda one, other: (told.append(("rename", str(other).removeprefix(str(tmp_path)))), real_replace(one, other))[1])
    monkeypatch.setattr(durable, "_exchange", lambda one, other: (told.append(("rename", str(other).removeprefix(str(tmp_path)))), real_exchange(one, other))[1])
    monkeypatch.setattr(Path, "rename", lambda one, other: (told.append(("rename", str(other).removeprefix(str(tmp_path)))), real_rename(one, other))[1])
    runs.write_text(tmp_path / "new" / "a.json", "{}")
    assert [kind for kind, _ in told] == ["sync", "sync", "rename", "sync"]
    assert told[0][1] == "" and told[1][1].startswith("/new/.a.") and told[2] == ("rename", "/new/a.json") and told[3] == ("sync", "/new")
    for turn in range(2):  # a folder that is new, and one in whose place another was
        told.clear()
        write_folder(tmp_path / "b", "text")
        place = told.index(("rename", "/b"))
        before, after = told[:place], told[place + 1:]
        synced = [one for _, one in before]
        assert sum(one.endswith(".txt") for one in synced) == 3 and sum(one.endswith(".part/inner") for one in synced) == 1
        assert synced[-1].endswith(".part") and after[0] == ("sync", ""), turn


def test_failures_leave_what_was_there(tmp_path: Path):
    runs.write_text(tmp_path / "a.txt", "old")
    write_folder(tmp_path / "f", "old")
    for kind in (ValueError, KeyboardInterrupt):
        with pytest.raises(kind), runs.atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise kind
        with pytest.raises(kind), runs.atomic_folder(tmp_path / "f") as fresh:
            (fresh / "a.txt").write_text("half")
            raise kind
    assert (tmp_path / "a.txt").read_text() == "old" and content(tmp_path / "f") == {"old", "3"}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.txt", "f"]


def test_sweeping_spares_the_living_and_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    here = durable._host()
    names = {"living": f".a.{here}-{child.pid}-00000000.part.json", "dead": f".b.{here}-{dead.pid}-00000000.part",
             "elsewhere": f".c.{'0' * 8}-{dead.pid}-00000000.part", "stale": f".d.{'0' * 8}-1-00000000.part.png"}
    for name in names.values():
        (tmp_path / name).touch()
    (tmp_path / ".keep.part").touch()
    os.utime(tmp_path / names["stale"], (1, 1))
    assert {path.name for path in runs.sweep(tmp_path)} == {names["dead"], names["stale"]}
    assert {path.name for path in runs.sweep(tmp_path, held=True)} == {names["living"], names["elsewhere"]}
    assert [path.name for path in tmp_path.iterdir()] == [".keep.part"]
    child.communicate()


def test_long_and_strange_names(tmp_path: Path):
    for name in ("ß" * 120 + ".json", "a b\n.json", ".hidden", "x" * 250 + ".txt"):
        runs.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
        with runs.atomic_path(tmp_path / name) as temporary:
            temporary.touch()
            assert durable.TEMPORARY.fullmatch(temporary.name) and len(os.fsencode(temporary.name)) < 255


# -- a full disk ------------------------------------------------------------------------------------------------------------

def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=10, f_frsize=4096, f_blocks=100))
    with pytest.raises(runs.DiskFull, match=r"40,960 bytes are free, and 50,000 bytes are needed for .*not-yet/here.*--resume") as found, \
            runs.room(tmp_path / "not-yet" / "here", 50_000):
        pytest.fail("written without room")
    assert (found.value.needed, found.value.free) == (50_000, 40_960)
    with runs.room(tmp_path, 40_960):
        pass
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=0))  # one that does not tell
    runs.check_room(tmp_path, 10**15)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
                                   RuntimeError("I/O error: No space left on device (os error 28)"), OSError("encoder error -2")])
def test_a_disk_that_fills_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=1, f_frsize=1024, f_blocks=100))
    runs.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(runs.DiskFull, match=r"1,024 bytes are free, and .*a\.txt needs more than that"), runs.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(runs.DiskFull, match=r"1,024 bytes are free, and 5,000 bytes are needed"):
        try:
            monkeypatch.setattr(space, "check_room", lambda path, needed: None)  # it filled after it was asked
            with runs.room(tmp_path / "f", 5_000), runs.atomic_folder(tmp_path / "f") as fresh, runs.atomic_path(fresh / "a") as temporary:
                raise error
        finally:
            assert sorted(one.name for one in tmp_path.iterdir()) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_bavail=1, f_frsize=1024, f_blocks=100))
    for error in (PermissionError(errno.EACCES, "no"), ValueError("no"), Problem("no", "no")):
        with pytest.raises(type(error)) as found, runs.atomic_path(tmp_path / "a"):
            raise error
        assert not isinstance(found.value, runs.DiskFull)


def test_metrics_on_a_full_disk_say_so(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(runs.DiskFull, match=r"metrics\.jsonl"):
        runs.append_metrics(tmp_path, step=1, loss=0.5)


# -- a disk that lies -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("write", [
    lambda path: tensors.save_tensors(path, {"a": torch.arange(64.0)}, {"k": "v"}, {"hash": ""}),
    lambda path: stream.save(path, stream.of_tensors({"a": torch.arange(64.0)}), {"k": "v"}, {"hash": ""}),
    lambda path: stream.save(path, stream.of_tensors({"a": torch.arange(64.0)}), None),
    lambda path: pickles.save_legacy({"a": torch.arange(64.0)}, path)], ids=["tensors", "stream with hash", "stream", "pt"])
@pytest.mark.parametrize("place", [9, -1], ids=["header", "numbers"])
def test_a_byte_that_changes_on_the_way_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], place: int):
    path = tmp_path / "a.safetensors"
    write(path)
    whole = path.read_bytes()
    real = durable.sync_file

    def flipped(one: Path) -> None:
        content = bytearray(one.read_bytes())
        content[place] ^= 1
        one.write_bytes(content)
        real(one)

    monkeypatch.setattr(durable, "sync_file", flipped)
    with pytest.raises(Problem, match="did not come back from the disk as it was written"):
        write(path)
    assert path.read_bytes() == whole and [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_stream_writes_what_the_library_writes_without_metadata(tmp_path: Path):
    from safetensors.torch import save_file

    state = {"b": torch.randn(3, 4), "a": torch.arange(5), "c": torch.tensor(2.0), "d": torch.empty(0)}
    stream.save(tmp_path / "ours", stream.of_tensors(state), None)
    save_file(state, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_size == stream.expected_bytes(stream.of_tensors(state), None)


# -- who works there --------------------------------------------------------------------------------------------------------

HOLDER = "import sys; from finetune import runs\nwith runs.locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"


def test_a_folder_has_one_owner_and_the_dead_own_nothing(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=Path(runs.__file__).parent.parent.parent)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(Problem, match=rf"Another process works in .*: process {child.pid} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\..*another --output"):
        with runs.locked(tmp_path):
            pytest.fail("two in one folder")
    child.kill()
    child.communicate()
    with runs.locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        with pytest.raises(Problem, match=f"process {os.getpid()} since"), runs.locked(tmp_path):
            pytest.fail("twice in one process")


def test_a_file_system_without_locks_holds_nobody_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def refuses(handle: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with runs.locked(tmp_path), runs.locked(tmp_path):
        assert (tmp_path / ".lock").is_file()
