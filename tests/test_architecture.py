"""Rules for the source code; a failure lists every file that breaks the rule."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("config", "datasets", "methods", "models", "utils")
SCRIPTS = ("train_stage1", "eval")
# Parts of the scripts: where data, methods and models meet, one run's life, what is drawn of it.
JOINTS = ("utils.build", "utils.run", "utils.report")
TOOLS = ("utils.sweep", "utils.compare", "utils.bench", "datasets.verify")  # commands of their own
SOURCES = [
    *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
    *(ROOT / f"{script}.py" for script in SCRIPTS),
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def room(name: str) -> str:
    """The package or tool that a module (or a name in it) belongs to; empty: third-party."""
    for part in (*TOOLS, *JOINTS, *SCRIPTS, *PACKAGES, "tests"):
        if name == part or name.startswith(f"{part}."):
            return part
    return ""


def may_import(part: str) -> set[str]:
    """One way: utils <- datasets, methods, models (apart) <- joints <- scripts; tools see all but scripts and tools.

    The bench trains arms of sweeps.
    """
    parts = {"datasets", "methods", "models", "utils"}
    if part in parts:
        return {part, "utils"}
    others = {"utils.bench": {"utils.sweep"}}.get(part, set())
    return parts | set(JOINTS) | others | ({part} if part in TOOLS else set())


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_one_way():
    wrong = {
        name: {n for n in imported(tree) if room(n) not in {"", *may_import(room(name))}}
        for name, tree in TREES.items()
    }
    assert not {name: names for name, names in wrong.items() if names}


def test_only_joints_scripts_and_tools_know_the_config():
    below = {name: tree for name, tree in TREES.items() if room(name) in PACKAGES and name != "utils.config"}
    readers = {n for n, t in below.items() if any(i.startswith(("utils.config", "yacs")) for i in imported(t))}
    arguments = {
        n: {a.arg for f in ast.walk(t) if isinstance(f, ast.FunctionDef) for a in f.args.args} for n, t in below.items()
    }
    assert not readers | {name for name, names in arguments.items() if "cfg" in names}


def test_only_one_file_imports_torch_distributed():
    assert {n for n, t in TREES.items() if any(i.startswith("torch.distributed") for i in imported(t))} == {
        "utils.distributed"
    }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions among the statements of ``tree``; expressions, most of a tree, are not visited."""
    statements = [child for field in ("body", "orelse", "handlers", "finalbody") for child in getattr(tree, field, [])]
    for statement in statements:
        if isinstance(statement, ast.FunctionDef):
            yield statement
        yield from functions(statement)


def test_no_function_is_longer_than_60_lines():
    tests = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("*.py")}
    long = [
        f"{name}: {function.name}"
        for name, tree in {**TREES, **tests}.items()
        for function in functions(tree)
        if function.end_lineno - function.lineno >= 60
    ]
    assert not long


def test_every_module_has_a_docstring():
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_top_level_files():
    known = {*PACKAGES, "tests", "train_stage1.py", "eval.py", "requirements.txt", "README.md", "LICENSE"}
    # What runs leave behind: data and results.
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"saved", "data", "__pycache__"}
    assert here <= known, f"unexpected: {sorted(here - known)}"
