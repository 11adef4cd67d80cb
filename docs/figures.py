"""Make the README's pictures and its measured table from a comparison: python docs/figures.py demo

report.png needs a chromium on the path; grid.png and the table need only the comparison's folder.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
PROMPTS, SIDE, LEFT, TOP = (0, 1, 3, 4, 7, 8), 112, 150, 40
COLUMNS = ("dino", "oracle", "clip_t", "kept", "leak")
COSTS = ("training_seconds", "trainable_parameters", "artifact_bytes")

# Sentences of the report's verdict that a README has room for.
SAID = ("Closest to the subject", "Follows the prompt best", "Leaves the base alone", "Smallest", "Fastest to train")


def grid(folder: Path, report: dict) -> Image.Image:
    """Prompts by methods, the first seed of each prompt, with names."""
    rows = [row for row in report["rows"] if (folder / row["row"] / "images").is_dir()]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 12)
    sheet = Image.new("RGB", (LEFT + len(rows) * (SIDE + 6), TOP + len(PROMPTS) * (SIDE + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    for across, row in enumerate(rows):
        title = row["title"].replace(" (", "\n(").replace("Textual ", "Textual\n").replace("Untouched ", "Untouched\n").replace("The true ", "The true\n")
        pen.multiline_text((LEFT + across * (SIDE + 6) + 2, 4), title, fill="black", font=font)
    for down, number in enumerate(PROMPTS):
        words = report["suite"]["subject"][number].replace("{}", "…").replace("… ", "…\n")
        pen.multiline_text((6, TOP + down * (SIDE + 6) + SIDE // 2 - 16), words, fill="black", font=font)
        for across, row in enumerate(rows):
            picture = Image.open(folder / row["row"] / "images" / f"subject-{number:02d}-0.png").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (LEFT + across * (SIDE + 6), TOP + down * (SIDE + 6)))
    return sheet


def screenshot(page: Path, target: Path) -> None:
    """The top of the report in a headless browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        sys.exit("docs/figures.py needs chromium for report.png; install it and run again.")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                        "--hide-scrollbars", f"--user-data-dir={profile}", f"--screenshot={target}", "--window-size=1280,1900",
                        page.resolve().as_uri()], check=True, capture_output=True)


def measured(folder: Path, report: dict) -> str:
    """The README's table: a few columns of table.md, as it has them, and the verdict's advice."""
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    titles = {column["key"]: column["title"] for column in report["columns"]}
    wanted = [0, *(place for place, title in enumerate(cells[0]) if any(title.startswith(titles[key]) for key in (*COLUMNS, *COSTS) if key in titles))]
    table = "\n".join("| " + " | ".join(row[place] for place in wanted) + " |" for row in cells)
    said = [f"- **{one['title']}.** {one['text']}" for one in report["verdict"] if one["title"] in SAID]
    return f"{table}\n\nFrom what the report says of it, in its own words:\n\n" + "\n".join(said)


def main() -> None:
    """See the module's first line."""
    folder = Path(sys.argv[1])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (DOCS / "images").mkdir(exist_ok=True)
    grid(folder, report).save(DOCS / "images" / "grid.png", optimize=True)
    screenshot(folder / "report.html", DOCS / "images" / "report.png")
    text = README.read_text(encoding="utf-8")
    block = f"<!-- measured: written by docs/figures.py -->\n{measured(folder, report)}\n<!-- /measured -->"
    README.write_text(re.sub(r"<!-- measured.*?/measured -->", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
