"""The rules of the house, checked on the source itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("config", "datasets", "methods", "models", "utils")
SCRIPTS = ("train_stage1", "eval")
ALLOWED = {
    "utils": {"utils"},
    "models": {"models", "utils"},
    "datasets": {"datasets", "utils"},
    "methods": {"methods", "utils"},
    "train_stage1": {"datasets", "methods", "models", "utils"},
    "eval": {"train_stage1", "datasets", "methods", "models", "utils"},
}
# Modules that are entry points of their own: they may import everything, and nothing imports them.
ENTRY_POINTS = {"datasets.verify", "utils.bench", "utils.sweep", "utils.compare"}
PARTS = {"utils.sweep_plan": "utils.sweep"}  # of an entry point, which alone may import them
SOURCES = [
    *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
    *(ROOT / f"{script}.py" for script in SCRIPTS),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=module_name)


@named(SOURCES)
def test_imports_run_one_way(path):
    name = module_name(path)
    others = {part for part, whole in PARTS.items() if name not in (part, whole)}
    assert not others & imported(ast.parse(path.read_text())), f"{name} imports a part of an entry point"
    if name in {*ENTRY_POINTS, *PARTS}:
        return
    own = name.split(".")[0]
    names = imported(ast.parse(path.read_text()))
    wrong = {n for n in names if n.split(".")[0] in {*ALLOWED, "tests"} - ALLOWED[own]} | (names & ENTRY_POINTS)
    assert not wrong, f"{name} imports {sorted(wrong)}"


@named([*SOURCES, *TESTS])
def test_no_function_is_longer_than_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@named(SOURCES)
def test_modules_and_public_names_are_documented(path):
    """A function of up to three statements, whose name and types say it all, needs no more words; nor does main."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node) or len(node.body) <= 3, f"{node.name} has no docstring"


@named([p for p in SOURCES if p.parent != ROOT and module_name(p) not in {"utils.config", *ENTRY_POINTS, *PARTS}])
def test_nothing_below_the_scripts_knows_the_config(path):
    tree = ast.parse(path.read_text())
    assert not {n for n in imported(tree) if n.startswith(("utils.config", "yacs"))}
    arguments = {a.arg for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for a in node.args.args}
    assert "cfg" not in arguments


@named([p for p in SOURCES if module_name(p) != "utils.distributed"])
def test_one_file_knows_about_processes(path):
    names = imported(ast.parse(path.read_text()))
    assert not {n for n in names if n.startswith("torch.distributed")}
    assert "dist." not in path.read_text()


def test_the_top_level_is_the_users():
    known = {*PACKAGES, "tests", "train_stage1.py", "eval.py", "requirements.txt", "README.md", "LICENSE"}
    # What runs leave behind: data and results.
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"saved", "data", "__pycache__"}
    assert here <= known, f"unexpected: {sorted(here - known)}"


def test_every_module_has_a_test_file():
    tests = {path.stem for path in TESTS}
    for path in SOURCES:
        name = module_name(path).split(".")[-1]
        if not any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text()))):
            continue  # declarations only
        assert f"test_{name}" in tests, f"{module_name(path)} has no tests/test_{name}.py"
