"""The written report: real content, nothing from outside, the same numbers in every form, and what is missing is said."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_fixture import METHODS, PROMPTS, SEEDS, edit, write_comparison
from rich.console import Console

from finetune import report
from finetune.errors import Problem
from finetune.report import words
from finetune.report.pictures import BUDGET, LADDER, choose
from finetune.report.read import read


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("report") / "out")
    assert report.write(folder) == folder / "report.html"
    return folder


@pytest.fixture
def fresh(tmp_path) -> Path:
    return write_comparison(tmp_path / "out", rows=["dreambooth", "lora"], prompts={kind: texts[:2] for kind, texts in PROMPTS.items()})


def page_of(folder: Path) -> str:
    return report.write(folder).read_text(encoding="utf-8")


def cells_of(page: str) -> dict[tuple[str, str], tuple[float, str]]:
    """(row, column) -> (full number, visible text) of the table."""
    found = re.findall(r'<td data-row="([^"]+)" data-column="([^"]+)" data-value="([^"]+)">(.*?)</td>', page)
    return {(row, column): (float(value), html.unescape(re.sub(r"<small.*", "", text).replace("<b>", "").replace("</b>", ""))) for row, column, value, text in found}


def test_the_page_shows_the_numbers_of_the_json(written):
    page, data = (written / "report.html").read_text(encoding="utf-8"), json.loads((written / "report.json").read_text(encoding="utf-8"))
    scores = json.loads((written / "scores.json").read_text(encoding="utf-8"))
    cells, decimals = cells_of(page), {column["key"]: column["decimals"] for column in data["columns"]}
    for row in scores["rows"]:
        for key, score in row["scores"].items():
            value, text = cells[row["row"], key]
            assert value == score["mean"] and text == words.score(score["mean"], decimals[key])
            assert f'<small class="interval">{words.interval(score["low"], score["high"], decimals[key])}</small>' in page
            assert next(one for one in data["rows"] if one["row"] == row["row"])["scores"][key]["mean"] == score["mean"]
    shown = [column for row, column in cells if row == "lora"]
    assert shown == ["clip_i", "dino", "clip_t", "drift", "other_drift", "diversity", "copy", "training_seconds", "seconds_per_step",
                     "peak_memory_bytes", "trainable_parameters", "artifact_bytes"]
    for name, (_, _, _, _, _, steps, pace, memory, parameters, size) in METHODS.items():
        assert cells[name, "training_seconds"][0] == steps * pace
        assert [cells[name, key][0] for key in ("peak_memory_bytes", "trainable_parameters", "artifact_bytes")] == [memory, parameters, size]


def test_csv_and_markdown_hold_the_same_numbers(written):
    scores = json.loads((written / "scores.json").read_text(encoding="utf-8"))
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO((written / "table.csv").read_text(encoding="utf-8")))}
    for row in scores["rows"]:
        for key, score in row["scores"].items():
            line = lines[row["row"]]
            assert [float(line[key]), float(line[f"{key}_low"]), float(line[f"{key}_high"])] == [score["mean"], score["low"], score["high"]]
    assert lines["real"]["clip_t"] == "" and float(lines["lora"]["artifact_bytes"]) == 223_000
    markdown = (written / "table.md").read_text(encoding="utf-8")
    lora = next(row for row in scores["rows"] if row["row"] == "lora")["scores"]["dino"]
    assert f"{words.score(lora['mean'])} {words.interval(lora['low'], lora['high'])}" in next(line for line in markdown.splitlines() if line.startswith("| LoRA"))


class Outside(HTMLParser):
    """Collects every address the page would load, and every element that could."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "xlink:href", "action", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "link", "img", "br", "path", "use", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in ("path", "use"):
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_the_page_loads_nothing_and_is_well_formed(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    parser = Outside()
    parser.feed(page)
    assert parser.open == [] and len(parser.addresses) > 100
    assert all(address.startswith(("data:", "#")) for address in parser.addresses)
    assert len(parser.ids) == len(set(parser.ids))
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", page) and "<script src" not in page
    assert str(written.parent) not in page  # no path of this machine in a page made to be shown
    assert len(page) < 6_000_000


def test_every_picture_is_the_rendered_one(written):
    """Toybox pictures go in pixel for pixel."""
    page = (written / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<img src="data:image/png;base64,([^"]+)" alt="LoRA: a photo of a sks backpack on the beach, seed 9710"', page)
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as shown, Image.open(written / "lora/images/subject-01-0.png") as rendered:
        assert shown.tobytes() == rendered.convert("RGB").tobytes()
    grid_lines = sum(len(texts) * SEEDS[kind] for kind, texts in PROMPTS.items())
    assert len(re.findall(r'alt="LoRA: ', page)) == grid_lines + 4  # the grid, four pairs of the copy check


def test_instances_judge_verdict_and_provenance_are_there(written):
    page = html.unescape((written / "report.html").read_text(encoding="utf-8"))
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    data = json.loads((written / "report.json").read_text(encoding="utf-8"))
    for statement in data["verdict"]:
        assert statement["title"] in plain
        for point in statement["points"] or [statement["text"]]:
            assert point in plain
    for text in ("training picture 00.png", "toybox/clip and toybox/encoder", "The toybox judge knows only the rendered world",
                 "b1946ac92492d2347c6235b4d2611184", "torch 2.13.0", "finetune compare --instance-dir pictures", "notes.txt: not a picture",
                 "6 subject prompts with 2 seeds each", "no measurable difference"):
        assert text in page
    assert page.count("nearest training picture: ") == 2 * 5 * 4  # text and caption, five methods, four pairs each


def test_snippets_name_files_that_were_exported(written):
    page = html.unescape((written / "report.html").read_text(encoding="utf-8"))
    assert 'StableDiffusionPipeline.from_pretrained("out/dreambooth/artifact")' in page
    assert 'pipe.load_textual_inversion("out/textual-inversion/artifact/learned_embeds.safetensors", token="<sks-backpack>")' in page
    assert 'pipe.load_lora_weights("out/lora/artifact", weight_name="pytorch_lora_weights.safetensors")' in page
    assert "write <lora:sks-backpack:1>" in page and "write <hypernet:sks-backpack:1>" in page
    assert "alone: other programs feed key and value only" in page
    for code in re.findall(r"<code>(from .*?)</code>", page, flags=re.DOTALL):
        compile(code, "snippet", "exec")


def test_plots_are_text_in_svg(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) == 7 and all("<text" in plot and "<metadata" not in plot and 'role="img"' in plot for plot in plots)
    time, size, memory, prompt, drift, loss, loss_seconds = plots
    ends = json.loads((written / "report.json").read_text(encoding="utf-8"))["rows"][1]["validation_loss"][-1]
    assert f"DreamBooth ends at {ends[1]:.4f}" in loss and f"DreamBooth ends at {ends[1]:.4f}" in loss_seconds and ends[0] == 500
    for plot, text in ((size, "artifact size, logarithmic"), (time, "training time, logarithmic"), (memory, "peak memory, logarithmic"),
                       (prompt, "CLIP-T, higher follows better"), (drift, "Drift, lower leaves the base alone"), (time, "untouched base")):
        assert text in plot
    for row, name in (("dreambooth", "c-red"), ("textual-inversion", "c-blue"), ("lora", "c-green")):
        assert all(f"var(--{name})" in plot and f'data-row="{row}"' in plot for plot in plots)
    assert not re.search(r"#[0-9a-f]{6}", "".join(plots))  # every colour follows the page into the dark


def test_every_colour_has_a_sister_in_the_dark(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    light, dark = re.search(r":root \{ (--c-base.*?) \}", page)[1], re.search(r"dark\) \{ :root \{ (--c-base.*?) \}", page)[1]
    assert re.findall(r"--c-\w+", light) == re.findall(r"--c-\w+", dark) and "--c-red: #D55E00;" in light and "--c-red: #F08A3C;" in dark


def test_the_order_of_the_page(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == ["grid", "price", "table", "verdict", "tradeoffs", "loss", "copies", "use", "settings"]
    levels = [int(level) for level in re.findall(r"<h(\d)[ >]", page)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(later <= earlier + 1 for earlier, later in zip(levels, levels[1:], strict=False))
    answer = json.loads((written / "report.json").read_text(encoding="utf-8"))["headline"]["answer"]
    assert f">{html.escape(answer, quote=False)}</h1>" in page


def test_every_picture_has_a_text_and_every_table_its_scopes(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    main = page[:page.index("<dialog")].replace('<img class="under" alt=""><img class="over" alt="">', "")  # filled by the script
    assert not re.findall(r'<img(?![^>]*alt="[^"]+)[^>]*>', main)
    assert not re.findall(r"<th(?![^>]*scope=)[ >]", page)


def test_bold_only_where_decided(fresh):
    def undecide(scores):
        for pair in scores["pairs"]:
            if {pair["a"], pair["b"]} == {"dreambooth", "lora"}:
                pair["decided"] = pair["metric"] == "drift"

    edit(fresh / "scores.json", undecide)
    page = page_of(fresh)
    bold = re.findall(r'<td data-row="([^"]+)" data-column="([^"]+)"[^>]*><b>', page)
    assert ("lora", "drift") in bold and ("lora", "artifact_bytes") in bold
    assert not {column for _, column in bold} & {"dino", "clip_i", "clip_t", "copy", "diversity"}


def test_a_failed_run_is_shown_with_its_reason(fresh):
    def fail(info):
        info["failed"] = [{"row": "lora", "error": "The loss of step 31 is not a number (<nan>)."}]
        info["rows"] = [row for row in info["rows"] if row["row"] != "lora"]

    edit(fresh / "comparison.json", fail)
    edit(fresh / "scores.json", lambda scores: scores.update(rows=[row for row in scores["rows"] if row["row"] != "lora"]))
    page = page_of(fresh)
    assert "<b>Failed:</b> The loss of step 31 is not a number (&lt;nan&gt;)." in page and "LoRA is not in the comparison" in page
    assert not [cell for cell in cells_of(page) if cell[0] == "lora"]


@pytest.mark.parametrize(("manifest", "reason"), [({"status": "failed", "reason": "out of memory"}, "out of memory"), ({"status": "failed: disk full"}, "disk full"),
                                                  ({"status": "interrupted"}, "not finished: its manifest says 'interrupted'")])
def test_failure_from_the_manifest(fresh, manifest, reason):
    (fresh / "lora/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert read(fresh).row("lora").failed == reason
    assert reason.replace("'", "&#39;") in page_of(fresh)


@pytest.mark.parametrize("gone", ["scores.json", "lora", "dreambooth/metrics.jsonl", "lora/images", "instances", "lora/manifest.json", "lora/settings.json"])
def test_missing_parts_leave_a_page(fresh, gone):
    shutil.rmtree(fresh / gone) if (fresh / gone).is_dir() else (fresh / gone).unlink()
    page = page_of(fresh)
    parser = Outside()
    parser.feed(page)
    assert parser.open == [] and "DreamBooth" in page and "LoRA" in page


def test_missing_columns_pairs_and_rows(fresh):
    def strip(scores):
        scores.update(pairs=[], rows=[row for row in scores["rows"] if row["row"] not in ("real", "base")])
        for row in scores["rows"]:
            row["scores"] = {"clip_i": {"mean": row["scores"]["clip_i"]["mean"], "low": None, "high": None, "n": 1}}

    edit(fresh / "scores.json", strip)
    page = page_of(fresh)
    assert {column for _, column in cells_of(page)} == {"clip_i", "training_seconds", "seconds_per_step", "peak_memory_bytes",
                                                        "trainable_parameters", "artifact_bytes"}
    assert "not compared: " in page


def test_one_method_alone(tmp_path):
    folder = write_comparison(tmp_path / "out", rows=["lora"])
    page = page_of(folder)
    assert "One way to teach a model this backpack" in page and "measurably above the untouched base" in page
    assert not re.search(r"<td [^>]*><b>", page)  # nothing is best among one


def test_stable_diffusion_sizes_stay_under_six_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.report.pictures.BUDGET", 600_000)
    folder = write_comparison(tmp_path / "out", rows=["dreambooth", "lora"], side=400, scale=240.0)
    page = page_of(folder)
    assert len(page) < 1_400_000 and "data:image/jpeg" in page
    assert "4.22 GB" in page and "8 h 20 min" in page


def test_the_ladder_prefers_large_pictures_that_fit(written):
    pictures = sorted((written / "lora/images").iterdir())
    assert choose({0: pictures}).side == LADDER[0][0]
    assert choose({0: pictures * 200, 1: pictures * 200}).seeds == 1
    assert BUDGET < 6_000_000


def test_text_from_files_is_escaped(fresh):
    edit(fresh / "comparison.json", lambda info: info.update(class_noun="<script>alert(1)</script>", model="/home/me/a&b"))
    page = page_of(fresh)
    assert "Base model <b>a&amp;b</b>" in page and "finetune generate --model &#39;/home/me/a&amp;b&#39; --artifact" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "a&amp;b" in page


def test_no_comparison_is_refused(tmp_path):
    with pytest.raises(Problem, match="has no comparison.json"):
        report.write(tmp_path)


def test_what_newer_evaluations_add(tmp_path):
    folder = write_comparison(tmp_path / "out", rows=["dreambooth", "lora"], modern=True)

    def add(scores):
        scores["columns"].append({"key": "oracle", "title": "Oracle", "better": "higher", "help": "Closeness to the true picture.", "group": "Truth"})
        scores["hidden"] = [{"key": "kid", "title": "Kernel distance", "reason": "it told 31.0 % of 600 known pairs wrongly."}]
        for row, value in zip(scores["rows"], (.3, .8, .7), strict=False):
            row["scores"]["oracle"] = {"mean": value, "low": value - .1, "high": value + .1, "n": 6}
        scores["rows"][1]["flags"] = ["copying"]

    edit(folder / "scores.json", add)
    page = re.sub(r"\s+", " ", html.unescape(page_of(folder)))
    for text in ("Told apart 98.7 % of 600 known pairs (oracle against other looks).", ">Truth</span>", "⚑ copies, cannot win",
                 "<b>Kernel distance</b> (it told 31.0 % of 600 known pairs wrongly).", "DINO against artifact size",
                 "DreamBooth goes from", "By what the world knows: Oracle", "DreamBooth copies its training pictures"):
        assert text in page
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert data["headline"]["rows"] == ["lora"] and "DreamBooth reads closer and is left out: it copies" in data["headline"]["sure"]
    assert not next(row for row in data["rows"] if row["row"] == "dreambooth")["best"][:1] == ["clip_i"]
    bold = re.findall(r'<td data-row="dreambooth" data-column="(\w+)"[^>]*><b>', page)
    assert not set(bold) & {"clip_i", "dino", "clip_t", "oracle"}  # a copier is best at nothing
    assert "Quality while training" in page and page.count('id="curve-') == 2 * 4


def test_a_wide_table_is_cut_between_groups(tmp_path):
    folder = write_comparison(tmp_path / "out", rows=["lora"])

    def widen(scores):
        for number in range(4):
            scores["columns"].append({"key": f"extra{number}", "title": f"Extra {number}", "better": "higher", "help": "", "group": "Truth"})
            scores["rows"][1]["scores"][f"extra{number}"] = {"mean": .5, "low": .4, "high": .6, "n": 6}

    edit(folder / "scores.json", widen)
    page = page_of(folder)
    tables = re.findall(r'<table class="numbers">.*?</table>', page, flags=re.DOTALL)
    assert len(tables) == 2 and "Extra 3" in tables[0] and "Artifact" in tables[1] and "Artifact" not in tables[0]
    assert "The real pictures" in tables[0] and "The real pictures" not in tables[1]


@pytest.mark.parametrize(("scale", "known"), [(1.0, False), (240.0, False), (2.5, True)])
def test_terminal_table_fits_80_columns(tmp_path, scale, known):
    folder = write_comparison(tmp_path / "out", scale=scale)
    if known:  # one column more
        def tell(scores):
            scores["columns"].append({"key": "oracle", "title": "Likeness to truth", "better": "higher", "help": "", "group": "Truth"})
            for row in scores["rows"]:
                row["scores"]["oracle"] = {"mean": .5, "low": .4, "high": .6, "n": 6}

        edit(folder / "scores.json", tell)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.terminal_table(folder))
    lines = console.export_text().splitlines()
    scores = {row["row"]: row["scores"] for row in json.loads((folder / "scores.json").read_text(encoding="utf-8"))["rows"]}
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert all(name in lines[1] for name in ("DINO", "CLIP-T", "Drift", "Train", "Size"))
    assert any(line.split()[:1] == ["Hypernetwork"] for line in lines)  # no word is broken
    assert f"{words.score(scores['lora']['dino']['mean'])} ±" in next(line for line in lines if "LoRA" in line)


def test_report_never_imports_torch(written):
    code = ("import sys; from finetune import report; report.write(sys.argv[1]); report.terminal_table(sys.argv[1]); "
            "print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'matplotlib.pyplot', 'tkinter'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, str(written)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
