"""Damaged and hostile inputs by the hundred thousand: nothing but a refusal or a clean result may come out.

    nice -n 10 python benchmarks/fuzz.py --cases 100000

Hypothesis makes the cases: files that were right, with bytes overwritten, cut, doubled and replaced by the numbers parsers stumble
over, and texts from the grammars' own signs. Each case is run under a bound on CPU seconds (a timer that counts this process's own time) and the
whole under a bound on memory (the process cannot get more address space than its own beside it). What is found is printed with the bytes
that make it again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from a checkout
    sys.path.insert(0, str(ROOT))

from fuzz_inputs import damaged, example_files, lying, texts  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from finetune.errors import Problem  # noqa: E402

SECONDS = 2.0  # of CPU, for one case
MEMORY = 2**30  # bytes of address space beside the program's own, for all cases together
PORTION = 500  # cases hypothesis makes before it starts anew: it remembers those of one run
MOST_PIXELS = 1_000_000


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


def memory(key: str, forget: bool = False) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM) since it was last told to forget what was."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def once(target: Target, case: Any, tally: Tally) -> None:
    """One case: what it took is noted, and what is neither a result nor a refusal kept, once for each kind and place."""
    tally.cases += 1
    before, begin = memory("VmRSS", forget=True), time.process_time()
    try:
        with bounded(SECONDS):
            tally.refused += target.read(case)
    except (Exception, Hang) as error:  # noqa: BLE001 - this is what is looked for
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        tally.found.setdefault(f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:120]}", case)
    tally.slowest = max(tally.slowest, time.process_time() - begin)
    tally.largest = max(tally.largest, memory("VmHWM") - before)


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
