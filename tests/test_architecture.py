"""The design's rules, checked on the source: which room may import which, no import cycles, no forbidden constructs."""

import ast
import graphlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "avg_llava"
# Each room imports only from those before it.
ROOMS = [
    "common",
    "model",
    "data",
    "checkpoints",
    "inference",
    "training",
    "evaluation",
    "planning",
    "reports",
    "mini",
    "bench",
    "serving",
    "cli",
]
PURE = ["model/anyres.py", "model/scaler.py", "model/splice.py", "training/losses.py"]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Names of imported modules; `from a import b` gives both a and a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward_imports(room: str, source: str) -> list[str]:
    """Imports of a module in `room` from a higher room, deferred and type-checking imports included."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    upward = []
    for module in imported_modules(ast.parse(source)):
        parts = module.split(".")
        if parts[0] == "avg_llava" and parts[1:] and parts[1] not in (*allowed, "__version__"):
            upward.append(module)
    return upward


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module of `sources` (name -> source) imports, anywhere in it.

    `from package import name` is an import of the module `package.name` where there is one, else of `package`.
    """
    graph: dict[str, set[str]] = {}
    for importer, source in sources.items():
        imported = set(imported_modules(ast.parse(source)))
        modules = {name if name in sources else name.rpartition(".")[0] for name in imported}
        graph[importer] = (modules & sources.keys()) - {importer}
    return graph


def find_cycle(graph: Mapping[str, Set[str]]) -> list[str]:
    """The modules of one import cycle, first and last the same; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def riddles(source: str) -> list[str]:
    """Docstrings that open with a relative clause instead of a statement."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    openings = ("What ", "Whether ", "Where ", "How ", "Who ", "Which ")
    return [text.partition("\n")[0] for text in docstrings if text.startswith(openings)]


def called_name(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def prints(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if called_name(node) == "print"]


def config_defaults(source: str) -> list[int]:
    """Lines that read a configuration field with a default of their own."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if called_name(node) == "getattr" and len(node.args) == 3:
            owner = ast.unparse(node.args[0]).lower()
            if "config" in owner or "settings" in owner:
                lines.append(node.lineno)
    return lines


def swallowed(source: str) -> list[int]:
    """Lines of handlers that catch everything and go on, or that do nothing with what they catch."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            goes_on = not any(isinstance(statement, ast.Raise) for statement in ast.walk(node))
            if (catches_all and goes_on) or all(isinstance(statement, ast.Pass) for statement in node.body):
                lines.append(node.lineno)
    return lines


def effects(source: str) -> list[str]:
    """Input, output and device logic of a module that should be pure."""
    tree = ast.parse(source)
    found = [
        name for name in imported_modules(tree) if name.split(".")[0] in ("os", "pathlib", "io", "json", "logging")
    ]
    for node in ast.walk(tree):
        if called_name(node) in ("open", "print"):
            found.append(f"{called_name(node)} in line {node.lineno}")
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "cpu"):
            found.append(f".{node.attr} in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_rooms_import_only_from_lower_ones(path):
    room = path.relative_to(PACKAGE).parts[0]
    if room == "__init__.py":
        return  # the public names, from any room
    assert room in ROOMS, f"{relative(path)} is in no room; ARCHITECTURE.md names {', '.join(ROOMS)}"
    assert upward_imports(room, path.read_text("utf-8")) == []


def test_no_import_cycles():
    sources = {
        ".".join(("avg_llava", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in SOURCES
    }
    assert find_cycle(import_graph({name: path.read_text("utf-8") for name, path in sources.items()})) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_module_is_written_as_agreed(path):
    source = path.read_text("utf-8")
    assert path.stem not in ("utils", "util", "helpers", "misc", "common"), "name a module after its subject"
    assert ast.get_docstring(ast.parse(source)), "a module has a docstring"
    assert riddles(source) == [], "a docstring says what the code does in the present tense"
    assert config_defaults(source) == [], "a field's default is declared once, in the configuration"
    assert swallowed(source) == [], "catch what you expect, and do something about it"
    if not relative(path).startswith("cli/"):
        assert prints(source) == [], "log, or return what is to be shown"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_have_no_effects(name):
    assert effects((PACKAGE / name).read_text("utf-8")) == []


def test_nothing_is_left_to_do_later():
    marks = ["TO" + "DO", "FIX" + "ME", "XX" + "X"]
    texts = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").iterdir(), *(ROOT / "configs").rglob("*.*")]
    files = filter(Path.is_file, texts)
    found = [f"{path}: {mark}" for path in files for mark in marks if mark in path.read_text("utf-8")]
    assert found == []


def test_test_files_mirror_the_package():
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and folder.name not in ("__pycache__", "data", "datasets", "distributed", "parity"):
            # tests/data holds files, so the tests of avg_llava/data are in tests/datasets.
            assert (PACKAGE / folder.name).is_dir(), f"tests/{folder.name} mirrors nothing"


class TestTheRulesCanFail:
    def test_imports(self):
        assert upward_imports("data", "from avg_llava.training import losses") == ["avg_llava.training.losses"]
        assert upward_imports("data", "import avg_llava.cli") == ["avg_llava.cli"]
        assert upward_imports("mini", "def f():\n    from avg_llava import cli") == ["avg_llava.cli"]
        assert upward_imports("model", "if TYPE_CHECKING:\n    from avg_llava.data import Sample") == [
            "avg_llava.data.Sample"
        ]
        assert upward_imports("data", "from avg_llava.model.anyres import num_crops\nimport os") == []

    def test_cycles(self):
        deferred = "def f():\n    from avg_llava.b import g"
        typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from avg_llava import a"
        assert find_cycle(import_graph({"avg_llava.a": deferred, "avg_llava.b": typed}))
        assert find_cycle(import_graph({"avg_llava.a": deferred, "avg_llava.b": "import os"})) == []

    def test_docstrings(self):
        assert riddles('def f():\n    """What makes it go."""') == ["What makes it go."]
        assert riddles('def f():\n    """Makes it go."""') == []

    def test_statements(self):
        assert prints("def f():\n    print(1)") == [2]
        assert config_defaults("getattr(self.config, 'x', 1)\ngetattr(module, 'x', 1)\ngetattr(config, 'x')") == [1]
        assert swallowed("try:\n    f()\nexcept ValueError:\n    pass") == [3]
        assert swallowed("try:\n    f()\nexcept Exception as error:\n    log(error)") == [3]
        assert swallowed("try:\n    f()\nexcept Exception as error:\n    raise KeyError from error") == []
        found = effects("import json\nx.cuda()\nopen('a')")
        assert sorted(found) == [".cuda in line 2", "json", "open in line 3"]
