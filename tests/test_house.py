# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The rules of the house: who imports whom, what a module keeps, and how long files and functions are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT


SCRIPT, PIPELINE, MODULE = "train_semantic_fill_lora", "pipeline_flux_fill_semantic", "semantic_attention"


def find_modules(root: Path) -> dict[str, Path]:
    """The modules at the top of a folder and in its packages, by the names that they are imported with."""
    modules = {path.stem: path for path in root.glob("*.py")}
    for init in root.glob("*/__init__.py"):
        package = init.parent
        modules[package.name] = init
        modules |= {f"{package.name}.{path.stem}": path for path in package.glob("*.py") if path != init}
    return modules


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in the file: in functions and for type checkers too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join(filter(None, [*parents, node.module]))
            # What follows `import` may be a module too.
            yield from (f"{source}.{alias.name}".removeprefix(".") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            # A name that is computed could be any module.
            assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno} imports a name that it computes"
            yield node.args[0].value


def read_imports(root: Path) -> dict[str, set[str]]:
    """For each module of a folder, those of the same folder that it imports."""
    modules, graph = find_modules(root), {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imported_names(path, module):
            parts = name.split(".")
            found = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            found = [prefix for prefix in found if prefix in modules]
            # Importing `a.b` runs `a` too, unless it is the package that this module is in and that runs already.
            graph[module] |= {prefix for prefix in found if not f"{module}.".startswith(f"{prefix}.")} | {*found[-1:]}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules each of which imports the next, and the last one the first; `None` if there are none."""
    done = set()

    def search(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        for imported in sorted(graph[module]):
            circle = search(imported, [*path, module])
            if circle is not None:
                return circle
        done.add(module)
        return None

    return next(filter(None, (search(module, []) for module in sorted(graph))), None)


IMPORTS = read_imports(ROOT)
MODULES = find_modules(ROOT)
PACKAGE = [name for name in MODULES if name.split(".")[0] == "semantic_fill"]
PRODUCT = [SCRIPT, PIPELINE, MODULE, *PACKAGE]


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


# -- The checks themselves --------------------------------------------------------------------------------------------


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


CIRCLE = {
    "a.py": "import os\nimport b\n",
    "b.py": "def f():\n    from house import c\n    return c\n",
    "house/__init__.py": "",
    "house/c.py": "from typing import TYPE_CHECKING\nfrom .d import x\n",
    "house/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nx = 1\n",
    "e.py": "import a, house.d as d\n",
}


def test_a_made_up_circle_is_found(tmp_path):
    write_files(tmp_path, CIRCLE)
    graph = read_imports(tmp_path)
    assert graph["a"] == {"b"} and graph["b"] == {"house", "house.c"} and graph["house.c"] == {"house.d"}
    assert graph["house.d"] == {"a"} and graph["e"] == {"a", "house", "house.d"} and graph["house"] == set()
    assert find_circle(graph) == ["a", "b", "house.c", "house.d"]


@pytest.mark.parametrize("name", ["a.py", "b.py", "house/c.py", "house/d.py"])
def test_a_circle_that_is_cut_is_none(tmp_path, name):
    write_files(tmp_path, CIRCLE | {name: "x = 1\n"})
    assert find_circle(read_imports(tmp_path)) is None


@pytest.mark.parametrize(
    "text",
    [
        "import a",
        "import a as other",
        "from a import x",
        "from house.d import y",
        "from . import d",
        "from .d import y",
        "import house.d",
        "import importlib\nimportlib.import_module('a')",
        "class C:\n    def f(self):\n        try:\n            import a\n        except ImportError:\n            pass",
    ],
)
def test_every_form_of_import_closes_a_circle(tmp_path, text):
    files = {"a.py": "import house.c", "house/__init__.py": "", "house/c.py": text, "house/d.py": "import house.c"}
    write_files(tmp_path, files)
    assert find_circle(read_imports(tmp_path)) is not None


def test_a_package_can_be_in_a_circle(tmp_path):
    files = {"a.py": "import house.c", "house/__init__.py": "from .d import y", "house/c.py": "", "house/d.py": ""}
    write_files(tmp_path, files)
    assert find_circle(read_imports(tmp_path)) is None
    write_files(tmp_path, {"house/d.py": "import a"})
    assert find_circle(read_imports(tmp_path)) == ["a", "house", "house.d"]
    write_files(tmp_path, {"house/d.py": "from house import z"})
    assert find_circle(read_imports(tmp_path)) == ["house", "house.d"]


# -- Imports ----------------------------------------------------------------------------------------------------------


def test_there_is_no_circle_of_imports():
    assert set(PRODUCT) <= IMPORTS.keys() and len(PACKAGE) > 10
    # The checker has seen imports between them.
    assert {"semantic_fill.options", "semantic_fill.checkpoints", PIPELINE} <= IMPORTS[SCRIPT]
    circle = find_circle(IMPORTS)
    assert circle is None, " imports ".join([*circle, circle[0]])


@pytest.mark.parametrize("module", PACKAGE)
def test_the_package_never_imports_the_script(module):
    assert IMPORTS[module] <= {PIPELINE, MODULE, *PACKAGE}


def test_the_pipeline_needs_one_other_file_and_that_needs_none():
    assert IMPORTS[PIPELINE] == {MODULE}
    assert IMPORTS[MODULE] == set()
    assert not IMPORTS["semantic_fill.files"]


def test_nothing_else_lies_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == {"setup.py", *(f"{m}.py" for m in (SCRIPT, PIPELINE, MODULE))}


def test_test_files_stand_alone():
    tests = {path.stem: path for path in (ROOT / "tests").glob("*.py")}
    for name, path in tests.items():
        imported = {full.split(".")[0] for full in imported_names(path, name)}
        assert not {other for other in imported if other.startswith("test_") and other in tests}, name


# -- What a module keeps ----------------------------------------------------------------------------------------------

CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def kept_state(tree: ast.Module) -> set[str]:
    """Names of a module that its functions bind anew, or whose lists, dictionaries or sets they change."""
    kept = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            kept |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    changed = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes = list(ast.walk(function))
        own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        for node in nodes:
            if isinstance(node, ast.Global):
                changed |= set(node.names)
            elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                changed |= {node.value.id} & kept - own if isinstance(node.value, ast.Name) else set()
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
                changed |= {node.func.value.id} & kept - own if isinstance(node.func.value, ast.Name) else set()
    return changed


@pytest.mark.parametrize(
    "text, changed",
    [
        ("x = 0\ndef f():\n    global x\n    x = 1", {"x"}),
        ("def f():\n    global x\n    x = 1", {"x"}),
        ("x = {}\ndef f(k):\n    x[k] = 1", {"x"}),
        ("x: dict = {}\ndef f(k):\n    x[k] += 1", {"x"}),
        ("x = {}\ndef f(k):\n    del x[k]", {"x"}),
        ("x, y = [], []\nclass C:\n    def f(self):\n        y.append(1)", {"y"}),
        ("x = set()\nf = lambda k: x.add(k)", {"x"}),
        ("x = {}\nx['a'] = 1\ndef f(k):\n    return x[k] | x.get(k)", set()),
        ("x = {}\ndef f(k):\n    x = []\n    x.append(k)\n    return x", set()),
        ("x = {}\ndef f(x):\n    x[0] = 1", set()),
    ],
)
def test_kept_state_is_found(text, changed):
    assert kept_state(ast.parse(text)) == changed


@pytest.mark.parametrize("module", PRODUCT)
def test_no_module_keeps_state(module):
    assert kept_state(parse(module)) == set()


# -- How things read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", PRODUCT)
def test_each_file_opens_with_what_it_is_for(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert "# Copyright 2026 The Semantic Fill authors." in "\n".join(text.splitlines()[:2])
    docstring = ast.get_docstring(parse(module)) or ""
    assert docstring.splitlines()[:1] and docstring.splitlines()[0].endswith((".", ":")), module


def test_the_script_reads_in_the_order_of_a_batch():
    lines = {node.name: node.lineno for node in parse(SCRIPT).body if hasattr(node, "name")}
    order = "Batch add_noise make_batch SemanticFillModel compare build_model build_optimizer assemble train main"
    places = [lines[name] for name in order.split()]
    assert places == sorted(places)


@pytest.mark.parametrize("module", [SCRIPT, *PACKAGE])
def test_no_file_is_longer_than_its_budget(module):
    budget = 600 if module == SCRIPT else 400
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= budget


def test_no_test_file_is_longer_than_its_budget():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("test_*.py")}
    assert len(lengths) > 20 and not {name: length for name, length in lengths.items() if length > 500}


@pytest.mark.parametrize("name", ["main", "train"])
def test_main_and_train_fit_a_screen(name):
    (function,) = (node for node in parse(SCRIPT).body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert function.end_lineno - function.lineno + 1 <= 75
