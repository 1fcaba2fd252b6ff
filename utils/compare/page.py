"""Compare one run or many on one page: python -m utils.compare RUN [RUN ...] --out page.html

RUN is a run's folder, such as saved/<name>_<time>. The page is a single HTML file with embedded figures; it needs
neither network nor JavaScript. For what a run did not record, the page names the option that records it.
"""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from utils.command_line import Parser, path
from utils.compare import sections
from utils.compare.read import Runs, differences, ended_runs, read_runs
from utils.errors import InputError
from utils.files import write_text

SECTIONS = {  # -> title; the template names a section as its function
    sections.results: "Results",
    sections.classes: "Accuracy per class",
    sections.confusion: "Confusion",
    sections.calibration: "Calibration",
    sections.similarity: "Similarity of classifier rows (Fig. 4)",
    sections.components: "Attraction and repulsion on a row (Fig. 5)",
    sections.collapse: "Neural collapse",
    sections.learning: "Learning curves",
    sections.decomposition: "Representation or classifier",
}


def main(arguments: Sequence[str] | None = None) -> None:
    hint = " (usage: %(prog)s RUN [RUN ...] --out page.html)"
    parser = Parser(prog="python -m utils.compare", description="One page for one or many runs.", hint=hint)
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="folder of a run, such as saved/<name>_<time>"
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the page, an HTML file")
    args = parser.parse_args(arguments)
    out = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out: {out} is a folder" if out.is_dir() else f"--out: there is no folder {out.parent}")
    folders, left_out = ended_runs(args.runs)
    runs = read_runs(folders)
    content = page(runs)
    try:
        write_text(out, content)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from None
    print(f"{out}: {', '.join(runs)}; {len(content) / 1e6:.1f} MB")
    for line in left_out:
        print(f"left out: {line}")


def page(runs: Runs) -> str:
    """Render the page as HTML; all text is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Report of {next(iter(runs))}",
        descriptions=sections.descriptions(runs),
        differences=differences(runs),
        titles={section.__name__: title for section, title in SECTIONS.items()},
        sections={section.__name__: section(runs) for section in SECTIONS},
    )
