"""The shape of the package, held by a test: floors, forbidden neighbours, cycles, refusals, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"
FLOORS = {
    "errors": 0,
    "settings": 1, "draws": 1, "diffusion": 1, "runs": 1, "formats": 1,
    "model": 2, "data": 2,
    "methods": 3, "engine": 3,
    "plan": 4,
    "training": 5, "evaluation": 5,
    "report": 6, "toybox": 6,
    "cli": 7, "__main__": 8,
}
ALSO = {("formats", "runs")}  # same floor: files are written by the one function that writes them safely
LONGEST_FILE, LONGEST_FUNCTION = 400, 70
CONCRETE = ("dreambooth", "textual_inversion", "lora", "hypernetwork", "pretrain", "ema")


@cache
def sources() -> dict[str, ast.Module]:
    """Module name -> its tree, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def room(module: str) -> str:
    """finetune.methods.lora -> methods; the package itself belongs to no room."""
    return module.split(".")[1] if "." in module else ""


def imports(module: str, top_level_only: bool = False) -> Iterator[str]:
    """Every absolute module name that a module imports, nested imports and `from X import submodule` included."""
    tree = sources()[module]
    nodes = list(outside_functions(tree)) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import; write it out, so that the floors can be read."
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = whole & sources().keys()
            yield from submodules
            if len(submodules) < len(whole):
                yield node.module or ""
    if not top_level_only:
        yield from lazy_homes(tree)


def lazy_homes(tree: ast.Module) -> Iterator[str]:
    """Modules named in text, as importlib.import_module gets them (`finetune.model.base`, `finetune.methods.lora:Lora`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("finetune."):
            name = node.value.partition(":")[0]
            if name in sources():
                yield name


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported, `if TYPE_CHECKING` left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from outside_functions(child)


def own_imports(module: str, **kind: bool) -> set[str]:
    return {name for name in imports(module, **kind) if name.startswith("finetune.")}


def test_every_room_has_a_floor():
    rooms = {room(module) for module in sources()} - {""}
    assert rooms <= FLOORS.keys(), f"new rooms without a floor: {rooms - FLOORS.keys()}"


def test_imports_point_down():
    wrong = [f"{module} (floor {FLOORS[room(module)]}) imports {name} (floor {FLOORS[room(name)]})"
             for module in sources() if room(module) for name in own_imports(module)
             if room(name) != room(module) and FLOORS[room(name)] >= FLOORS[room(module)]
             and (room(module), room(name)) not in ALSO]
    assert not wrong, "A module imports only from lower floors and its own room:\n" + "\n".join(wrong)


@pytest.mark.parametrize(("who", "never"), [
    ("methods", "training"), ("methods", "evaluation"), ("methods", "report"), ("evaluation", "training"),
    ("training", "evaluation"), ("report", "torch"), ("report", "diffusers"), ("report", "transformers"),
])
def test_neighbours_that_must_not_know_each_other(who: str, never: str):
    target = f"finetune.{never}" if never in FLOORS else never
    wrong = [f"{module} imports {name}" for module in sources() if room(module) == who for name in imports(module)
             if name == target or name.startswith(target + ".")]
    assert not wrong, f"{who} never imports {never}:\n" + "\n".join(wrong)


def test_nothing_imports_the_command_line():
    wrong = [f"{module} imports {name}" for module in sources() if room(module) not in ("cli", "__main__")
             for name in own_imports(module) if room(name) == "cli"]
    assert not wrong, "\n".join(wrong)


def test_training_names_no_concrete_method():
    wrong = []
    for module, tree in sources().items():
        if room(module) != "training":
            continue
        wrong += [f"{module} imports {name}" for name in own_imports(module) if name.rpartition(".")[2] in CONCRETE]
        wrong += [f"{module}:{node.lineno} says {node.value!r}" for node in ast.walk(tree) if isinstance(node, ast.Constant)
                  and isinstance(node.value, str) and node.value.replace("-", "_") in CONCRETE]
    assert not wrong, "The loop asks the Method; it does not know which one it has:\n" + "\n".join(wrong)


def test_methods_do_not_know_one_another():
    files = {f"finetune.methods.{name}" for name in CONCRETE if name != "ema"}
    wrong = [f"{module} imports {name}" for module in files & sources().keys() for name in own_imports(module) if name in files - {module}]
    assert not wrong, "\n".join(wrong)


def test_no_cycle_when_importing():
    graph = {module: {name for name in own_imports(module, top_level_only=True) if name in sources()} - {module} for module in sources()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "cycle: " + " -> ".join([*trail[trail.index(module):], module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_refusal_says_what_and_why_or_what_to_do():
    wrong, seen = [], 0
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem"):
                continue
            seen += 1
            parts = dict(zip(("what", "why", "fix"), node.args, strict=False)) | {word.arg: word.value for word in node.keywords}
            filled = {name for name, value in parts.items() if not (isinstance(value, ast.Constant) and not str(value.value).strip())}
            if "what" not in filled or not filled & {"why", "fix"}:
                wrong.append(f"{module}:{node.lineno} says {sorted(filled)}")
    assert seen > 20
    assert not wrong, "A refusal says what is wrong, and why or what to do:\n" + "\n".join(wrong)


def test_no_error_is_swallowed_unseen():
    wrong = [f"{module}:{node.lineno}" for module, tree in sources().items() for node in ast.walk(tree)
             if isinstance(node, ast.ExceptHandler) and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
             and all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)]
    assert not wrong, "\n".join(wrong)


def test_pickles_are_opened_with_weights_only():
    wrong = [f"{module}:{node.lineno}" for module, tree in sources().items() for node in ast.walk(tree)
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
             and not any(word.arg == "weights_only" and getattr(word.value, "value", None) is True for word in node.keywords)]
    assert not wrong, "\n".join(wrong)


def test_a_file_has_one_subject_and_a_function_fits_a_screen():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > LONGEST_FILE:
            wrong.append(f"{path.relative_to(ROOT)} has {lines} lines")
        wrong += [f"{path.relative_to(ROOT)}: {node.name} has {length} lines" for node in ast.walk(ast.parse(text))
                  if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                  and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION]
    assert not wrong, f"At most {LONGEST_FILE} lines a file and {LONGEST_FUNCTION} a function:\n" + "\n".join(wrong)
