"""Tables as text, Markdown and LaTeX: the first column to the left, all others to the right."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """``rows``: as many cells in each as in ``head``; ``bold``: (row, column) of the cells to emphasise."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    bold: Collection[tuple[int, int]] = ()


def text(table: Table, width: int = 0, gap: str = "  ") -> str:
    """Columns ``gap`` apart and as wide as their cells; all but the first at least ``width`` characters."""
    lines = [table.head, *table.rows]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = [max(other, width) for other in others]
    return "\n".join(gap.join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines)


def markdown(table: Table) -> str:
    """The caption, if any, and the table."""
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    lines = [table.head, rule, *_marked(table, lambda cell: cell.replace("|", "\\|"), "**{}**")]
    caption = f"{table.caption}:\n\n" if table.caption else ""
    return caption + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(table: Table) -> str:
    """A floating table; needs ``\\usepackage{booktabs}``."""

    def line(cells: Iterable[str]) -> str:
        joined = " & ".join(cells) + r" \\"
        return "{}" + joined if joined[0] in "[*" else joined  # or they would be options of the line above

    lines = [
        *(r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.caption)}}}"),
        *(rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule", line(map(escaped, table.head))),
        *(r"\midrule", *map(line, _marked(table, escaped, r"\textbf{{{}}}")), r"\bottomrule"),
        *(r"\end{tabular}", r"\end{table}", ""),
    ]
    return "\n".join(lines)


def _marked(table: Table, escape, emphasis: str) -> list[list[str]]:
    return [
        [emphasis.format(escape(cell)) if (y, x) in table.bold else escape(cell) for x, cell in enumerate(row)]
        for y, row in enumerate(table.rows)
    ]


LATEX = {
    **{sign: f"\\{sign}" for sign in "%_&#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$"},
}


def escaped(cell: str) -> str:
    """As LaTeX prints it; a minus sign is no hyphen."""
    cell = re.sub(r"(?<!\w)-(?=\d)|(?<= )-(?= )", "−", cell)
    return "".join(LATEX.get(sign, sign) for sign in cell)
