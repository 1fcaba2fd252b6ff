"""Tables on paper: the columns of text, Markdown and LaTeX."""

from utils.table import Table, escaped, latex, markdown, text

TABLE = Table(["arm", "n", "top-1"], [["none", "3", "70.00"], ["a | b", "10", "-1.50"]], "50 % of it", {(1, 0), (1, 2)})


def test_text_has_its_first_column_to_the_left_and_the_others_to_the_right():
    assert text(TABLE) == "arm     n  top-1\nnone    3  70.00\na | b  10  -1.50"
    assert text(TABLE, width=6, gap="").splitlines()[1] == "none      3 70.00"
    assert text(Table(["arm"], [])) == "arm"


def test_markdown_escapes_bars_and_marks_bold_cells():
    assert markdown(TABLE).splitlines() == [
        *("50 % of it:", "", "| arm | n | top-1 |", "| --- | ---: | ---: |", "| none | 3 | 70.00 |"),
        "| **a \\| b** | 10 | **-1.50** |",
    ]
    assert markdown(TABLE._replace(caption="")).startswith("| arm |")


def test_latex_escapes_what_it_would_read_as_a_command():
    lines = latex(TABLE).splitlines()
    assert r"\caption{50 \% of it}" in lines and r"\begin{tabular}{lrr}" in lines
    assert r"\textbf{a $|$ b} & 10 & \textbf{$-$1.50} \\" in lines
    assert escaped("x_1 & {#}") == r"x\_1 \& \{\#\}"
    assert latex(Table(["[a]", "b"], [["*", "1"]])).count("\n{}") == 2  # or they would be options of the line above
