"""The pages of the repository: links, commands, options and files that they name exist."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from datasets.decoding import FORMATS
from datasets.specs import SPECS
from methods.method import COUNTS, LOSSES
from models import BACKBONES
from tests.conftest import ROOT
from utils.config import OBSOLETE, OLD_SWITCHES, OPTIONS, parse_option, read_config

ROOMS = ("config", "datasets", "methods", "models", "utils", "tests")
TOP = ROOT / "README.md"
PAGES = [TOP, *(page for room in ROOMS for name in ("README.md", "EXACT.md") for page in (ROOT / room).rglob(name))]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
CONFIGURED = ("train_stage1.py", "eval.py", "datasets.verify")  # their arguments: --cfg FILE ... [key value ...]
TOOLS = ("datasets.verify", "utils.sweep", "utils.compare", "utils.bench", "utils.bench.engine")
# A run's own, a placeholder, and a file that the released code lacks.
NO_FILES = {"config.yaml", "SWEEP.yaml", "methods.py"}
ANY_RUN = "config/digits/digits_imb005.yaml"  # for saved/<run>/config.yaml

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path | str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return FENCED.sub("", read(page))


# ---------------------------------------------------------------------------------------------------------------------
# Links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every link that leads to no other site."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if not re.match(r"https?://", link):
            yield (page.parent / path).resolve() if path else page, anchor


@each_page
def test_links_resolve(page):
    for target, anchor in links(page):
        assert target.is_relative_to(ROOT) and target.is_file(), target
        assert not anchor or anchor in anchors(target), f"{target.relative_to(ROOT)}#{anchor}"


def test_every_page_and_picture_is_linked():
    linked = {target for page in PAGES for target, _ in links(page)}
    assert {*PAGES[1:], *(ROOT / ".assets").iterdir()} <= linked


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a code block or between backticks that runs Python."""
    blocks = "\n".join(block for block in FENCED.findall(read(page)) if not block.startswith("```python"))
    lines = re.sub(r"\\\n\s*", " ", blocks).splitlines()
    lines += re.findall(r"^ {4,}(\S.*)$", prose(page), re.MULTILINE)
    lines += [span.replace("\n", " ") for span in SPAN.findall(prose(page))]
    parts = [part for line in lines for part in line.replace("$f", "0.1").split(" && ") if "..." not in part]
    return [shlex.split(part, comments=True) for part in parts if re.search(r"\b(python3?|torchrun) ", part)]


def program(words: list[str]) -> tuple[str, list[str]]:
    """(script or module, its arguments); launchers are passed over."""
    script = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if script is not None and "pytest" not in words:
        return words[script], words[script + 1 :]
    module = words.index("-m") + 1
    return words[module], words[module + 1 :]


@each_page
def test_commands_name_what_exists(page, capsys):
    for words in commands(page):
        name, arguments = program(words)
        assert (ROOT / name).is_file() if name.endswith(".py") else find_spec(name), words
        files = [word for word in arguments if word.endswith((".py", ".yaml")) and "<" not in word]
        assert all((ROOT / file).is_file() or file in NO_FILES for file in files), words
        if name in TOOLS:
            known = help_text(name, capsys)
            assert all(word in known for word in arguments if word.startswith("--")), words
        if name in CONFIGURED and "--cfg" in arguments:
            cfg = arguments[arguments.index("--cfg") + 1]
            read_config(ANY_RUN if "<" in cfg else ROOT / cfg, overrides(arguments))
        if name == "pytest":
            markers = {name for option, value in pairwise(arguments) if option == "-m" for name in value.split()}
            assert all(f"{name}:" in read(".pytest.ini") for name in markers - {"not", "and", "or"}), words


def overrides(arguments: list[str]) -> list[str]:
    """The ``key value`` pairs; every ``--option`` has one value."""
    neighbours = pairwise(["", *arguments])
    return [word for before, word in neighbours if not before.startswith("--") and not word.startswith("--")]


def help_text(module: str, capsys) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        runpy.run_module(module, run_name="__main__")
    return capsys.readouterr().out


def test_the_two_commands():
    """.ci/run finds them by how they begin."""
    first, second = re.findall(r"^    pip install -r requirements.txt && (.*)$", read(TOP), re.MULTILINE)
    assert first.startswith("python train_stage1.py --cfg ") and second == "python -m pytest"


# ---------------------------------------------------------------------------------------------------------------------
# Names


@each_page
def test_files_that_are_named_exist(page):
    configurations = {path.name for path in (ROOT / "config").rglob("*.yaml")}
    for span in SPAN.findall(prose(page)):
        if re.fullmatch(r"[\w./-]+\.(py|yaml)", span) and span not in NO_FILES | configurations:
            places = (ROOT / span, page.parent / span, ROOT / "tests" / span)
            assert any(place.is_file() for place in places), span


@each_page
def test_options_between_backticks_have_values_that_are_allowed(page):
    for span in SPAN.findall(prose(page)):
        words = span.replace(": ", " ").split()
        if words[0] in OPTIONS and len(words) % 2 == 0:
            for key, value in zip(words[::2], words[1::2], strict=True):
                parse_option(key, yaml.safe_load(value))


def test_every_option_is_listed_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ", read("config/README.md"), re.MULTILINE)
    assert {key: parse_option(key, yaml.safe_load(value)) for key, value in rows} == {
        key: option.default for key, option in OPTIONS.items()
    }
    assert len(rows) == len(OPTIONS)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("config/README.md", [*LOSSES, *COUNTS, *SPECS, *OBSOLETE, *OLD_SWITCHES]),
        ("config/README.md", [name for name in BACKBONES if not name.endswith("x2")]),
        ("methods/README.md", [*LOSSES, *COUNTS]),
        ("datasets/README.md", SPECS),
    ],
)
def test_everything_that_can_be_chosen_is_named(page, names):
    missing = [name for name in names if not re.search(rf"`{name}\b", read(page))]
    assert not missing


@pytest.mark.parametrize("name", ["imagenet", "ina2018", "places"])
def test_every_configuration_of_the_large_data_sets_is_named(name):
    stems = {path.stem for path in (ROOT / "config" / name).glob(f"{name}_*.yaml")}
    assert stems and not [stem for stem in stems if f"`{stem}`" not in read("config/README.md")]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_ending_is_a_file(name):
    table = read("config/README.md").partition("| file ends in ")[2].partition("\n\n")[0]
    endings = re.findall(r"`(_\w+)`", table)
    assert len(endings) == 6
    for ending in ("", *endings):
        assert all((ROOT / f"config/{name}/{name}_{f}{ending}.yaml").is_file() for f in ("imb001", "imb002", "imb01"))


def test_data_sets_have_the_figures_of_the_table():
    page = read("datasets/README.md")
    assert all(f"| {name} |" in page for name in FORMATS)
    for name, spec in SPECS.items():
        ranges = ", ".join(f"{first}-{end - 1}" for first, end in spec.shot_ranges or ())
        assert re.search(rf"^\| `{name}` \|.* {ranges} \|$", page, re.MULTILINE) or not ranges, name
        if spec.published:
            assert f"| {spec.published.train:,}, {spec.published.test:,}; {spec.num_classes:,} |" in page


def test_the_first_page_is_short():
    assert len(read(TOP).splitlines()) <= 250
