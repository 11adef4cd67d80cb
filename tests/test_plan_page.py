"""`finetune plan`: the page, the JSON, and what is refused."""

from __future__ import annotations

import json

import pytest

from finetune.cli import app
from finetune.cli.plan_page import clock
from finetune.plan.reality import size


def test_the_page_says_first_what_everybody_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plan", "lora", "--rank", "4", "--memory-limit", "4GB", "--no-calibrate", "--no-table"]) == 0
    page = capsys.readouterr().out
    lines = [line.strip() for line in page.splitlines() if line.strip()]
    assert lines[0].startswith("LoRA on toybox")
    assert [line.split()[0] for line in lines[1:6]] == ["fits", "memory", "time", "artifact", "disk"]
    assert "yes, in the 4.0 GB of --memory-limit" in lines[1]
    assert max(map(len, page.splitlines())) <= 80


def test_json_holds_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plan", "textual-inversion", "--vectors", "3", "--memory-limit", "100MB", "--no-calibrate", "--no-table", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (plan,) = told["plans"]
    assert (told["limit_bytes"], plan["trainable"], plan["fits"]) == (100_000_000, 3 * 160, False)
    assert plan["peak"] == max(plan["moments"].values())


def test_settings_of_another_method_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plan", "hypernetwork", "--rank", "4"]) == 2
    assert "hypernetwork has no setting --rank" in " ".join(capsys.readouterr().err.split())
    assert app.run(["plan", "lorra"]) == 2
    assert "'lora'" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "expected"), [(0.123, "0.12 s"), (17, "17 s"), (200, "3 min 20 s"), (13_680, "3 h 48 min"), (187_200, "2 d 4 h")])
def test_clock(seconds: float, expected: str) -> None:
    assert clock(seconds) == expected


@pytest.mark.parametrize(("number", "expected"), [(512, "512 bytes"), (12_345, "12.3 KB"), (480_000_000, "480 MB"), (3_226_184_000, "3.2 GB")])
def test_size(number: int, expected: str) -> None:
    assert size(number) == expected
