"""Damaged and hostile inputs by the hundred thousand: nothing but a refusal or a clean result may come out.

    nice -n 10 python benchmarks/fuzz.py --cases 100000

Hypothesis makes the cases: files that were right, with bytes overwritten, cut, doubled and replaced by the numbers parsers stumble
over, and texts from the grammars' own signs. Each case is run under a bound on CPU seconds (a timer that counts this process's own time) and the
whole under a bound on memory (the process cannot get more address space than its own beside it). What is found is printed with the bytes
that make it again.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from a checkout
    sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from finetune.errors import Problem  # noqa: E402

SECONDS = 2.0  # of CPU, for one case
MEMORY = 2**30  # bytes of address space beside the program's own, for all cases together
PORTION = 500  # cases hypothesis makes before it starts anew: it remembers those of one run
MOST_PIXELS = 1_000_000
NUMBERS = [struct.pack(kind, value) for kind, values in (
    ("<B", (0, 0x7F, 0x80, 0xFF)), ("<H", (0, 0x7FFF, 0xFFFF)), ("<I", (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)), (">I", (1, 0x7FFFFFFF)),
    ("<Q", (0, 2**31, 2**40, 2**63 - 1, 2**64 - 1))) for value in values]


class Hang(BaseException):
    """A case took more CPU time than one may."""


@dataclass
class Target:
    """One reader under test.

    Attributes:
        cases: hypothesis strategy of its inputs.
        read: one input to whatever it makes; Problem is its way to refuse.
        share: of all cases.
    """

    name: str
    cases: Any
    read: Callable[[Any], Any]
    share: float


@dataclass
class Tally:
    """What a target's cases came to."""

    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest: int = 0
    found: dict[str, Any] = field(default_factory=dict)


# -- inputs --------------------------------------------------------------------------------------------------------------


def mutated(whole: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """A file with changes made one after another, at places counted modulo its length."""
    content = bytearray(whole)
    for kind, place, new in changes:
        start = place % (len(content) + 1)
        if kind == "overwrite":
            content[start:start + len(new)] = new
        elif kind == "insert":
            content[start:start] = new
        elif kind == "delete":
            del content[start:start + 1 + len(new) ** 3]
        elif kind == "double":
            content[start:start] = content[start:start + 64]
        else:
            del content[start:]
    return bytes(content)


def damaged(files: list[bytes]) -> Any:
    """Strategy: one of the files with up to six changes, or bytes that were never a file."""
    change = st.tuples(st.sampled_from(["overwrite"] * 4 + ["insert", "delete", "double", "cut"]), st.integers(0, 2**16),
                       st.sampled_from(NUMBERS) | st.binary(max_size=8))
    return st.builds(mutated, st.sampled_from(files), st.lists(change, max_size=6)) | st.binary(max_size=64)


def lying(files: list[bytes]) -> Any:
    """Strategy: safetensors files whose header is still JSON and says something else than the data."""
    odd = st.sampled_from([0, 1, -1, 2**31, 2**63, 2**70, 1.5, None, True, "F32", "", [], {}, [0], [2, 2], [2**40, 2**40], [0, 0], [0, 2**40], "\ud800"])

    def told(whole: bytes, edits: list[tuple[int, str, Any]], extra: bytes) -> bytes:
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8:8 + length])
        for place, key, value in edits:
            name = sorted(header)[place % len(header)]
            if isinstance(header[name], dict) and key:
                header[name][key] = copy.deepcopy(value)
            else:
                header[name] = copy.deepcopy(value)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length:] + extra

    edit = st.tuples(st.integers(0, 99), st.sampled_from(["dtype", "shape", "data_offsets", "format", ""]), odd)
    return st.builds(told, st.sampled_from(files), st.lists(edit, max_size=3), st.sampled_from([b"", b"\0"]))


def texts(words: list[str], most: int = 16) -> Any:
    """Strategy: texts of a grammar's own pieces, and of any signs."""
    piece = st.sampled_from(words) | st.text(max_size=4) | st.builds(lambda word, count: word * count, st.sampled_from(words), st.sampled_from([2, 50, 1000]))
    return st.lists(piece, max_size=most).map("".join)


def example_files(folder: Path) -> dict[str, list[bytes]]:
    """Small files of every kind that is read: safetensors, pickles, pictures."""
    import torch
    from PIL import Image, ImageCms

    from finetune.formats import embedding, hypernetwork, lora
    from finetune.formats.hypernetwork_file import HypernetworkFile
    from finetune.formats.lora_kinds import LoraModule

    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    pair = {name: LoraModule(torch.ones(2, 4), torch.ones(4, 2), 2.0)}
    lora.write_kohya(folder / "a.safetensors", pair, {"finetune.trigger": "sks"}, torch.float16)
    lora.write_peft(folder / "b.safetensors", pair, {}, torch.float32)
    embedding.write_safetensors(folder / "word.safetensors", torch.ones(2, 8), {"finetune.trigger": "<w>"})
    embedding.write_webui(folder / "word.pt", torch.ones(2, 8), "word", 3, "base", "0123456789")
    embedding.write_diffusers(folder / "learned_embeds.safetensors", torch.ones(1, 8), "<w>", {})
    states = {(8, role): {key: torch.ones(shape) for key, shape in (("linear.0.weight", (16, 8)), ("linear.0.bias", (16,)),
                                                                   ("linear.1.weight", (8, 16)), ("linear.1.bias", (8,)))} for role in ("key", "value")}
    content = HypernetworkFile(states, [1, 2, 1], "linear", activate_output=False, name="net", step=3)
    hypernetwork.write_webui(folder / "net.pt", content)
    hypernetwork.write_safetensors(folder / "net.safetensors", content, {"finetune.trigger": "sks"})
    torch.save({"string_to_param": {"*": torch.ones(1, 8)}, "name": "zip"}, folder / "zip.pt")
    torch.save({"<w>": torch.ones(8)}, folder / "bin.bin")
    picture = Image.effect_mandelbrot((9, 7), (-2, -1, 1, 1), 20)
    pictures = []
    for kind, mode, more in (("PNG", "RGB", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "I;16", {}), ("PNG", "LA", {}), ("JPEG", "RGB", {"exif": _turned()}),
                             ("JPEG", "CMYK", {}), ("GIF", "P", {"save_all": True, "append_images": [picture]}), ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
                             ("WEBP", "RGB", {}), ("PNG", "RGB", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()}), ("BMP", "RGB", {}), ("ICO", "RGBA", {"sizes": [(9, 7)]}), ("TGA", "RGB", {}), ("PPM", "RGB", {}),
                             ("DDS", "RGB", {}), ("PCX", "RGB", {}), ("SGI", "RGB", {}), ("JPEG2000", "RGB", {}), ("AVIF", "RGB", {})):
        with suppress(KeyError, OSError, ValueError):  # a Pillow that cannot write this kind
            target = io.BytesIO()
            picture.convert("L").convert(mode).save(target, kind, **more)
            pictures.append(target.getvalue())
    return {"safetensors": [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))],
            "pt": [path.read_bytes() for path in sorted(folder.glob("*.pt")) + sorted(folder.glob("*.bin"))], "pictures": pictures}


def _turned() -> Any:
    """EXIF that says the picture lies on its side."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# -- readers -------------------------------------------------------------------------------------------------------------


def tried(*readers: Callable[[], Any]) -> int:
    """Call each reader; 1 when all of them refused."""
    refused = 0
    for reader in readers:
        try:
            reader()
        except Problem:
            refused += 1
    return int(refused == len(readers))


def targets(folder: Path) -> list[Target]:
    """All readers with their cases; files are written into `folder`."""
    from finetune.settings import TrainSettings, recipes

    files = example_files(folder)
    signs = list("()[]:\\<>{}=,.|\"'#\n\t ") + ["BREAK", "(a:1.2)", "<lora:a:0.5>", "<hypernet:a>", "<w>", "a photo of a {}", "1e400", "-", "0", "AND", "\ud800", "\x00", "猫"]
    packaged = [path.read_bytes() for path in recipes().values()]
    toml = ["rank", "learning_rate", "steps", "model", "method", "class_noun", "preview_prompt", "export", "=", " = ", "\n", "[", "]", "{", "}", ".", ",", "\"", "'''", "#",
            "1", "-1", "1e999", "nan", "inf", "true", "1979-05-27", "0x", "\\u", "\"a\"", "[[", "é"]
    value = st.sampled_from(toml[18:]) | st.builds(json.dumps, st.text(max_size=8) | st.integers() | st.floats() | st.lists(st.integers(), max_size=3))
    line = st.builds("{} = {}".format, st.sampled_from([*TrainSettings.model_fields, "rank", "placeholder", "vectors", "method"]), value)
    lines = st.lists(line, max_size=3).map(lambda found: "\n".join(found).encode("utf-8", "surrogatepass"))
    table = ["file_name", "text", "caption", ",", "\n", "\r", "\"", "a.png", "{", "}", "[", "]", ":", "{\"file_name\": \"a.png\", \"text\": \"x\"}\n", "\\ud800", "null",
             "1", "../", "/etc/passwd", "\x00", "\ufeff", "é"]
    return [
        Target("recipes", lines | texts(toml).map(lambda text: text.encode("utf-8", "surrogatepass")) | damaged(packaged), lambda data: read_recipe(folder, data), 0.15),
        Target("prompts", texts(signs), read_prompt, 0.2),
        Target("safetensors", damaged(files["safetensors"]) | lying(files["safetensors"]), lambda data: read_safetensors(folder, data), 0.2),
        Target("pickles", damaged(files["pt"]), lambda data: read_pickle(folder, data), 0.15),
        Target("captions", st.tuples(st.sampled_from(["a.txt", "a.caption", "metadata.csv", "metadata.jsonl"]),
                                     texts(table).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=64)),
               lambda data: read_caption(folder, *data), 0.1),
        Target("pictures", damaged(files["pictures"]), read_picture, 0.2),
    ]


def read_recipe(folder: Path, data: bytes) -> int:
    """A recipe as a method's settings."""
    from finetune.methods.textual_inversion import Settings
    from finetune.settings import resolve

    path = folder / "fuzzed.toml"
    path.write_bytes(data)
    return tried(lambda: resolve(Settings, {}, path))


def read_prompt(text: str) -> int:
    """A prompt by its tags, its weights, its chunks, and as a template."""
    from finetune.data.prompts import fill
    from finetune.model import prompts, tags

    def chunked() -> None:
        plain, _ = tags.find(text)
        for weight in (weight for _, weight in prompts.parse(plain)):
            assert isinstance(weight, float)
        prompts.count(_reader(), plain)

    return tried(lambda: tags.uses(tags.find(text)[1]), chunked, lambda: fill(text, "sks dog"))


def _reader() -> Any:
    """What `prompts.count` asks of a base: the toybox's tokenizer and one learned word."""
    if not _KEPT:
        from finetune.toybox import tokenizer

        _KEPT.append(SimpleNamespace(tokenizer=tokenizer.build(), placeholders={"<w>": ["<w>", "<w>_1"]}))
    return _KEPT[0]


_KEPT: list[Any] = []


def read_safetensors(folder: Path, data: bytes) -> int:
    """A safetensors file by everything that reads one."""
    from finetune.formats import acceptance, embedding, hypernetwork, lora_read, stream
    from finetune.formats.inspect import inspect
    from finetune.formats.tensors import load_tensors

    path = folder / "fuzzed.safetensors"
    path.write_bytes(data)
    return tried(lambda: load_tensors(path), lambda: list(stream.each(path)), lambda: lora_read.read_adapters(path), lambda: embedding.read(path),
                 lambda: hypernetwork.read(path), lambda: inspect(path), lambda: acceptance.check(path))


def read_pickle(folder: Path, data: bytes) -> int:
    """A torch pickle by everything that reads one."""
    from finetune.formats import acceptance, embedding, hypernetwork, pickles
    from finetune.formats.inspect import inspect

    path = folder / "fuzzed.pt"
    path.write_bytes(data)
    return tried(lambda: pickles.load_restricted(path), lambda: embedding.read(path), lambda: hypernetwork.read(path), lambda: inspect(path),
                 lambda: acceptance.check(path))


def read_caption(folder: Path, name: str, data: bytes) -> int:
    """A caption file; what it gives can be written as UTF-8 again."""
    from finetune.data.captions import read_captions

    path = folder / name
    path.write_bytes(data)
    found, notes = read_captions([path])
    path.unlink()
    for text in (*found, *found.values(), *notes):
        text.encode()
    return 0 if found else 1


def read_picture(data: bytes) -> int:
    """A picture: upright RGB within the limit, or a reason."""
    from finetune.data.picture import Unreadable, decode

    try:
        image, notes = decode(io.BytesIO(data), MOST_PIXELS)
    except Unreadable as reason:
        str(reason).encode()
        return 1
    assert image.mode == "RGB" and image.width * image.height <= MOST_PIXELS and all(notes)
    return 0


# -- running -------------------------------------------------------------------------------------------------------------


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise Hang when what is inside takes more CPU time than that (user time of this process; waiting does not count)."""
    def stop(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds} CPU seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def once(target: Target, case: Any, tally: Tally) -> None:
    """One case: what it took is noted, and what is neither a result nor a refusal kept, once for each kind and place."""
    tally.cases += 1
    highest, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with bounded(SECONDS):
            tally.refused += target.read(case)
    except (Exception, Hang) as error:  # noqa: BLE001 - this is what is looked for
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        tally.found.setdefault(f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:120]}", case)
    tally.slowest = max(tally.slowest, time.process_time() - begin)
    tally.largest = max(tally.largest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest) * 1024)


def run(target: Target, cases: int, first: int = 0) -> Tally:
    """So many cases of one target, in portions with seeds of their own: the same numbers give the same cases."""
    tally = Tally()
    number = first
    while tally.cases < cases:
        size = min(PORTION, cases - tally.cases)

        @seed(number)
        @settings(max_examples=size, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(target.cases)
        def portion(case: Any) -> None:
            once(target, case, tally)

        portion()
        number += 1
    return tally


def limit_memory() -> None:
    """No more address space than the program has now and MEMORY beside it: a case that asks for more fails where it asks."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    """Run, print a table, write JSON; exit code 1 when something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="over all readers")
    parser.add_argument("--only", default="", help="one reader by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    given_args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from finetune.cli import quiet

    quiet.hush()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        chosen = [target for target in targets(Path(name)) if given_args.only in ("", target.name)]
        whole = sum(target.share for target in chosen)
        for target in chosen:
            run(target, 20, 10**6)  # imports, which are no case's doing
        limit_memory()
        print(f"{'reader':<12} {'cases':>8} {'refused':>8} {'slowest s':>10} {'largest MiB':>12} {'found':>6}")
        for target in chosen:
            tally = run(target, round(given_args.cases * target.share / whole), given_args.seed)
            print(f"{target.name:<12} {tally.cases:>8,} {tally.refused:>8,} {tally.slowest:>10.3f} {tally.largest / 2**20:>12.1f} {len(tally.found):>6}", flush=True)
            for what, case in tally.found.items():
                print(f"  {what}\n    {case!r:.2000}", flush=True)
            rows[target.name] = {"cases": tally.cases, "refused": tally.refused, "slowest_seconds": tally.slowest, "largest_bytes": tally.largest,
                                 "found": list(tally.found)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{sum(row['cases'] for row in rows.values()):,} cases, {sum(len(row['found']) for row in rows.values())} findings, peak memory {peak / 2**20:,.0f} MiB")
    if given_args.json:
        given_args.json.write_text(json.dumps({"readers": rows, "peak_bytes": peak}, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if any(row["found"] for row in rows.values()) else 0)


if __name__ == "__main__":
    main()
