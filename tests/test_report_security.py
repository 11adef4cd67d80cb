"""A report of a folder that a stranger wrote: every text of it is text in a real browser, nothing runs, nothing is asked of anywhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_browser import Browser
from report_fixture import PROMPTS, edit, write_comparison

from finetune import report, runs
from finetune.errors import Problem

MARKUP = "<script>window.pwned=1</script><img src=x onerror=window.pwned=1><svg onload=window.pwned=1>"
POISON = f"\"'></title></style></script>{MARKUP}<a href=\"javascript:window.pwned=1\">{{{{ 7 * 7 }}}} $\\frac{{ --> ]]>"
# Names by which files and rows find one another; what people read is everything else.
NAMES = {"run", "file", "key", "metric", "better", "kind", "status", "method", "row", "a", "b", "instance_files", "suite", "finished", "family", "sha256", "flags"}
FEW = {kind: texts[:1] for kind, texts in PROMPTS.items()}


def poisoned(value: Any, key: str = "") -> Any:
    """Every text with markup at its end; row "lora" has it in its very name."""
    if isinstance(value, dict):
        return {name: poisoned(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part, key) for part in value]
    if key in ("row", "a", "b") and value == "lora":
        return "lora" + POISON
    return value + POISON if isinstance(value, str) and key not in NAMES else value


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison in which every text is an attack."""
    folder = write_comparison(tmp_path_factory.mktemp("hostile") / "out", rows=["dreambooth", "lora", "hypernetwork-key-query"], modern=True, prompts=FEW)
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(poisoned(runs.read_json(path))), encoding="utf-8")
    edit(folder / "hypernetwork-key-query" / "manifest.json", lambda told: told.update(status="failed", reason=POISON))
    return report.write(folder)


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


def test_no_text_becomes_markup(browser: Browser, hostile: Path):
    page = hostile.read_text(encoding="utf-8")
    assert page.count("window.pwned=1") > 200 and "<img src=x" not in page and "49" not in re.findall(r"javascript:window.pwned=1&#34;&gt;(.{0,6})", page)
    browser.open(hostile)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.click(".filter input")
    assert browser.run("typeof window.pwned") == "undefined" and browser.console == []
    assert browser.run("document.scripts.length") == 1
    assert browser.run("[...document.querySelectorAll('*')].filter((one) => [...one.attributes].some((own) => own.name.startsWith('on'))).length") == 0
    assert browser.run("[...document.links].filter((one) => one.protocol === 'javascript:').length") == 0
    assert [url for url in browser.requests if not url.startswith("data:")] == [hostile.resolve().as_uri()]
    assert browser.run("document.querySelector('h1').textContent").count("<script>") >= 1  # there as text, and read as text


def test_what_is_shown_of_a_picture_stays_text(browser: Browser, hostile: Path):
    browser.open(hostile)
    browser.click("td[data-row] img")
    assert "<script>" in browser.run("document.querySelector('dialog figcaption').textContent")
    assert browser.run("document.querySelectorAll('dialog script').length") == 0 and browser.run("typeof window.pwned") == "undefined"


def test_markup_that_got_in_could_neither_run_nor_ask(browser: Browser, hostile: Path, tmp_path: Path):
    """The policy holds where escaping would have failed: the attack is put into the page raw."""
    (tmp_path / "near.js").write_text("window.pwned = 1", encoding="utf-8")
    attack = (MARKUP + '<script src="near.js"></script><img src="https://example.com/a.png"><iframe src="https://example.com/"></iframe>'
              '<link rel="stylesheet" href="https://example.com/a.css"><style>body { background: url(https://example.com/b.png) }</style>'
              '<p id="styled" style="background: url(https://example.com/c.png)">x</p><base href="https://example.com/">'
              '<object data="https://example.com/d"></object><form id="form" action="https://example.com/"><input name="a"></form>'
              '<meta http-equiv="refresh" content="9999;url=https://example.com/">')
    raw = hostile.read_text(encoding="utf-8").replace("<main>", "<main>" + attack, 1)
    (tmp_path / "raw.html").write_text(raw, encoding="utf-8")
    browser.open(tmp_path / "raw.html")
    browser.run("document.getElementById('form').submit()")
    asked = """fetch("https://example.com/e").then(() => "answered").catch(() => "refused")"""
    assert browser.run(asked) == "refused"
    assert browser.run("typeof window.pwned") == "undefined"
    assert browser.run("location.protocol") == "file:" and browser.run("document.baseURI").startswith("file:")
    told = " ".join(browser.console)
    assert told.count("Content Security Policy") >= 7
    for kind in ("script-src", "img-src", "style-src", "default-src", "base-uri", "form-action"):
        assert kind in told, kind


def test_the_policy_names_the_page_s_own_script_and_style_alone(hostile: Path):
    page = hostile.read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1])
    rules = {part.split()[0]: part.split()[1:] for part in policy.split("; ")}
    hashed = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
              for text in (re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1] for tag in ("style", "script"))]
    assert rules["default-src"] == ["'none'"] and rules["script-src"] == [hashed[1]] and rules["style-src-elem"] == [hashed[0]]
    assert rules["img-src"] == ["data:"] and rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_tables_beside_the_page(hostile: Path):
    text = (hostile.parent / "table.md").read_text(encoding="utf-8")
    assert "<script>" not in text and "<img" not in text and "&#60;script>" in text
    folder = hostile.parent
    edit(folder / "comparison.json", lambda info: info["rows"][0].update(title="=HYPERLINK(\"https://example.com\")"))
    report.write(folder)
    with (folder / "table.csv").open(encoding="utf-8") as file:
        assert not [cell for line in csv.reader(file) for cell in line if re.match(r"[=+@]", cell)]


def test_lines_to_copy_run_nothing_else(tmp_path: Path):
    folder = write_comparison(tmp_path / "out", rows=["lora", "textual-inversion"], prompts=FEW)
    evil = 'dog"; touch owned; $(touch owned) `touch owned` #\\'

    def change(info: dict[str, Any]) -> None:
        info["model"] = "base; touch owned"
        for row in info["rows"]:
            row["subject"] = evil

    edit(folder / "comparison.json", change)
    page = html.unescape(report.write(folder).read_text(encoding="utf-8"))
    shells = re.findall(r"<code>(finetune generate .*?)</code>", page)
    assert len(shells) == 2
    for line in shells:
        words = shlex.split(line)
        assert words[words.index("--model") + 1] == "base; touch owned" and evil in words[words.index("--prompt") + 1]
    for code in re.findall(r"<code>(from .*?)</code>", page, flags=re.DOTALL):
        values = [node.value for node in __import__("ast").walk(compile(code, "snippet", "exec", flags=0x400)) if hasattr(node, "value") and isinstance(node.value, str)]
        assert any(evil in value for value in values) and "base; touch owned" in values


def test_pictures_and_runs_outside_the_folder_are_not_shown(tmp_path: Path):
    folder = write_comparison(tmp_path / "out", rows=["lora"], prompts=FEW)
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "private.png")
    plain = report.write(folder).read_text(encoding="utf-8").count("<img ")

    def elsewhere(scores: dict[str, Any]) -> None:
        for row in scores["rows"]:
            for image, name in zip(row["images"], ("../private.png", str(tmp_path / "private.png")), strict=False):
                image["file"] = name
                image.setdefault("nearest", {"similarity": 1.0})["file"] = str(tmp_path / "private.png")

    edit(folder / "scores.json", elsewhere)
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    edit(folder / "scores.json", lambda scores: scores["rows"][1]["images"][2].update(file="link.png"))
    assert report.write(folder).read_text(encoding="utf-8").count("<img ") < plain
    from finetune.report.pictures import data_uri

    assert data_uri(tmp_path / "private.png") not in (folder / "report.html").read_text(encoding="utf-8")
    edit(folder / "comparison.json", lambda info: info["rows"][0].update(run="../../elsewhere"))
    with pytest.raises(Problem, match=r"names '../../elsewhere', which lies outside it"):
        report.write(folder)
