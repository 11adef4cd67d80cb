"""Fifteen hundred damaged and hostile inputs, and each that once broke something. benchmarks/fuzz.py makes a hundred thousand of the same."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import re
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from finetune.data.captions import read_captions
from finetune.errors import Problem
from finetune.formats import header, pickles
from finetune.model import prompts
from finetune.model.text import check_text

CASES = {"recipes": 250, "prompts": 150, "safetensors": 300, "pickles": 250, "captions": 250, "pictures": 300}
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def fuzz() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("fuzz")


@pytest.fixture(scope="module")
def targets(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {target.name: target for target in fuzz.targets(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_a_result_or_a_refusal(name: str, fuzz: Any, targets: dict[str, Any]) -> None:
    fuzz.run(targets[name], 5, 10**6)  # imports
    tally = fuzz.run(targets[name], CASES[name], 1000)
    assert tally.found == {} and tally.cases == CASES[name]
    assert tally.largest < 256 * 2**20 and tally.slowest < fuzz.SECONDS


def test_what_is_wrong_would_be_found(fuzz: Any) -> None:
    """A reader that fails, one that never ends, one that takes memory: each is noted."""
    def waits(case: bytes) -> int:
        while True:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 0.05)
        for read, found in ((lambda case: 1 // 0, "ZeroDivisionError"), (waits, "Hang")):
            tally = fuzz.Tally()
            fuzz.once(fuzz.Target("bad", None, read, 1.0), b"case", tally)
            assert len(tally.found) == 1 and next(iter(tally.found)).startswith(found)
    tally = fuzz.Tally()
    kept: list[bytearray] = []
    fuzz.once(fuzz.Target("large", None, lambda case: kept.append(bytearray(b"x") * 2**28) or 0, 1.0), b"case", tally)
    assert tally.largest >= 2**27 and not tally.found


# -- what was found ------------------------------------------------------------------------------------------------------


def safetensors(path: Path, entries: dict[str, Any], data: bytes = bytes(4)) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", [["F32"], {"a": 1}, None, 4])
def test_a_dtype_that_is_no_text(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(Problem, match="unknown dtype"):
        header.read_header(safetensors(tmp_path / "a.safetensors", {"x": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}))


@pytest.mark.parametrize("entries", [{"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, {"__metadata__": {"a": "\udfff"}},
                                     {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": "\ud800"}}])
def test_half_a_sign_in_a_header(entries: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Problem, match="is not Unicode"):
        header.read_header(safetensors(tmp_path / "a.safetensors", entries, bytes(4) if len(entries) == 1 and "__metadata__" not in entries else b""))


def test_a_pickle_that_asks_for_more_memory_than_there_is(tmp_path: Path) -> None:
    """BINBYTES8 and BYTEARRAY8 say how many bytes follow: here an exabyte, which the file does not have."""
    for opcode in (b"\x8e", b"\x96", b"\x8d"):
        (tmp_path / "a.pt").write_bytes(b"\x80\x04" + opcode + struct.pack("<Q", 2**60) + b"x.")
        for read in (pickles.globals_in, pickles.load_restricted):
            with pytest.raises(Problem, match="is not a torch file"):
                read(tmp_path / "a.pt")


def test_a_zip_whose_directory_points_nowhere(tmp_path: Path) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
    content = bytearray(target.getvalue())
    place = content.rindex(b"PK\x05\x06")
    content[place + 16:place + 20] = struct.pack("<I", 2**31)  # where the directory begins
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(Problem, match="is not a torch file"):
        pickles.load_restricted(tmp_path / "a.pt")


def test_a_zip_that_would_unpack_to_a_hundred_times_its_size(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/data/0", bytes(100 * 2**20))
    assert (tmp_path / "a.pt").stat().st_size < 2**20
    with pytest.raises(Problem, match="would unpack to 104,857,6"):
        pickles.load_restricted(tmp_path / "a.pt")


@pytest.mark.parametrize("text", [" " * 50_000, "(" + "1" * 20_000, ":" + "1" * 50_000 + "x", "( " * 150 + "a " * 2_000, ":" + " " * 50_000])
def test_prompts_that_took_the_square_of_their_length(text: str) -> None:
    begin = time.process_time()
    assert prompts.parse(text)
    assert time.process_time() - begin < 0.5


def test_brackets_within_brackets_end(tiny_model: Path) -> None:
    assert prompts.parse("(" * prompts.DEEPEST + "a")[0][1] == pytest.approx(1.1**prompts.DEEPEST)
    with pytest.raises(Problem, match="more than 200 brackets"):
        prompts.parse("(a" * 20_000)


def test_break_takes_the_white_space_beside_it() -> None:
    """As before, when one expression did it in quadratic time."""
    assert prompts.parse("a  BREAK \n b BREAK") == [("a", 1.0), ("BREAK", -1.0), ("b", 1.0), ("BREAK", -1.0)]
    assert prompts.parse(" a (x BREAK y:1.5) ") == [(" a ", 1.0), ("x", 1.5), ("BREAK", -1.0), ("y", 1.5), (" ", 1.0)]


def test_half_a_sign_in_a_prompt() -> None:
    with pytest.raises(Problem, match=r"'a \? b' is not Unicode text. Sign 3 of it"):
        check_text("a \udcff b")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"file_name": ' + "9" * 5_000 + "}"])
def test_json_lines_that_broke_the_parser(line: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + '\n{"file_name": "a.png", "text": "half \\ud800 sign"}\n')
    found, notes = read_captions([tmp_path / "metadata.jsonl"])
    assert found == {"a.png": "half ? sign"} and "line 1 is not a JSON object" in notes[0]


@pytest.mark.parametrize("config", ['{"use_dropout": fals }', "[]", "5", '{"sizes": 3}', '{"sizes": [8], "layer_structure": "x"}', "[" * 100_000])
def test_settings_of_a_hypernetwork_that_do_not_read(config: str, tmp_path: Path) -> None:
    from finetune.formats import hypernetwork
    from finetune.formats.inspect import inspect

    told = {"finetune.format": "hypernetwork", "finetune.format_version": "1", "hypernetwork_config": config}
    path = safetensors(tmp_path / "a.safetensors", {"__metadata__": told, "hypernet.8.k.linear.0.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    with pytest.raises(Problem):
        hypernetwork.read(path)
    assert inspect(path).warnings


@pytest.mark.parametrize(("told", "said"), [("{", "do not read as a JSON object"), ("[]", "it holds a list"), ('{"unet.lora_alpha": "x"}', "they say no number"),
                                            ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}', "a pattern that may never end")])
def test_metadata_of_a_lora_that_do_not_read(told: str, said: str) -> None:
    from finetune.formats.lora_keys import adapter_alphas

    with pytest.raises(Problem, match=re.escape(said)):
        adapter_alphas({"lora_adapter_metadata": told})("unet." + "a" * 60, 4)
