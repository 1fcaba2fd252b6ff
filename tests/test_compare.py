"""The page of runs: made by the real command from runs of the real script, and opened in a real browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from methods.neural_collapse import balance_metrics
from tests.conftest import ARB, content, failure, history, train
from utils.compare import page as compare
from utils.config import dump_config, load_config
from utils.files import write_text
from utils.metrics import Predictions, calibration_error, half_accuracies, report, shot_groups
from utils.report.text import save_predictions

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

CE = "config/digits/digits_imb005.yaml"
MEASURED = ("num_epochs", 2, "diagnostics", 2, "nc_every", 1)
CHROMIUM = shutil.which("chromium")
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def arb(tmp_path_factory) -> Path:
    """ARB-Loss and mixup, with all that can be recorded."""
    folder = train(tmp_path_factory.mktemp("saved"), *MEASURED)
    last = folder / "ckps" / "current.pth.tar"
    eval_script.main(["--cfg", ARB, "resume", str(last), "decompose", "True"])
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Cross-entropy on the same images, without mixup."""
    return train(tmp_path_factory.mktemp("saved"), *MEASURED, cfg=CE)


@pytest.fixture(scope="module")
def both(arb, plain, tmp_path_factory) -> Path:
    """The page of the two."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    compare.main([str(plain), str(arb), "--out", str(out)])
    return out


@pytest.fixture
def older(plain, tmp_path) -> Path:
    """A copy of the run as earlier versions wrote it."""
    folder = shutil.copytree(plain, tmp_path / "older_20250101000000")
    (folder / "diagnostics.npz").unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("nc")
        row["test"].pop("ece_groups")
    write_rows(folder, rows)
    edit_checkpoint(folder, lambda stored: stored.pop("class_names"))
    options = {"diagnostics", "diagnostics_rows", "nc_every", "decompose"}
    kept = [line for line in (folder / "config.yaml").read_text().splitlines() if line.split(":")[0] not in options]
    (folder / "config.yaml").write_text("\n".join(kept))
    return folder


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_checkpoint(folder, change):
    stored = content(folder)
    change(stored)
    torch.save(stored, folder / "ckps" / "current.pth.tar")


def edit_last_row(folder, **changes):
    *rows, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    write_rows(folder, [*rows, last | changes])


def edit_arrays(folder, **changes):
    stored = dict(np.load(folder / "diagnostics.npz"))
    np.savez(folder / "diagnostics.npz", **(stored | changes))


def edit_decomposition(folder, change):
    path = next(folder.glob("eval/*/decomposition.json"))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


class Page(HTMLParser):
    """Tables as rows of cells, pictures, headings, and the text of paragraphs by class."""

    def __init__(self, path: Path):
        super().__init__()
        self.tables, self.images, self.ids, self.links = [], [], [], []
        self.lines: dict[str, list[str]] = {}
        self._into = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._into = self.tables[-1][-1]
        elif tag == "p":
            self._into = self.lines.setdefault(found.get("class", ""), [])
            self._into.append("")
        elif tag == "img":
            self.images.append(found)
        elif tag == "a":
            self.links.append(found["href"])
        elif tag == "section":
            self.ids.append(found["id"])

    def handle_endtag(self, tag):
        if tag in ("td", "th", "p"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data

    def rows(self, first: str) -> list[list[str]]:
        """Of the table whose head begins with ``first``, cells joined."""
        (found,) = (table for table in self.tables if " ".join(table[0]).startswith(first))
        return found[1:]


def made(*runs, out) -> Page:
    compare.main([*map(str, runs), "--out", str(out)])
    return Page(out)


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


def test_the_table_has_the_runs_own_numbers(both, arb, plain):
    rows = Page(both).rows("run choice")
    assert [row[:2] for row in rows] == [
        [label, choice]
        for label in ("digits_imb005", "digits_imb005_arbloss_mixup")
        for choice in ("last epoch", "cross-fitted best", "best on the test set")
    ]
    for folder, mine in ((plain, rows[:3]), (arb, rows[3:])):
        summary = json.loads((folder / "summary.json").read_text())
        for row, found in zip(mine, summary.values(), strict=True):
            assert row[2].split(", ") == [str(epoch) for epoch in dict.fromkeys(found["epochs"])]
            by_index = [found.get(key) for key in ("top1", "many", "medium", "few", "ece")]
            assert [row[3], *row[4:7], row[10]] == [compare.number(value) for value in by_index]
        last = history(folder)[-1]["test"]
        by_count = [last["shots"]["count"].get(group) for group in ("many", "medium", "few")]
        assert mine[0][7:10] == [compare.number(value) for value in by_count]


def test_group_sizes_and_training_are_said(both):
    page, said = Page(both), both.read_text()
    assert "classes by index: many 3, medium 4, few 3; classes by count: many 2, medium 4, few 4" in page.lines["note"]
    assert "ARB-Loss with batch class counts" in said and "mixup alpha 1" in said
    assert "cross-entropy, no mixup, on digits (exp, imbalance factor 0.05)" in said
    assert "SGD for 2 epochs" in said and "seed 0, subset seed 0" in said
    assert "warning" not in page.lines


def test_worst_and_best_classes(both, arb):
    tables = [table for table in Page(both).tables if table[0][0] == "class"]
    predictions = np.load(arb / "predictions" / "1.npz")["classes"]
    targets = np.load(arb / "predictions" / "targets.npz")["targets"]
    accuracy = [100 * (predictions[targets == c] == c).mean() for c in range(10)]
    rows = tables[1][1:]
    assert [row[1] for row in rows] == ["worst"] * 5 + ["best"] * 5
    assert float(rows[0][3]) == pytest.approx(min(accuracy), abs=0.01)
    assert float(rows[5][3]) == pytest.approx(max(accuracy), abs=0.01)
    for name, _, count, percent in rows:
        assert float(percent) == pytest.approx(accuracy[int(name)], abs=0.01)
        assert int(count) == content(arb)["class_counts"][int(name)]


def test_every_section_is_in_the_contents_and_has_its_picture(both):
    page = Page(both)
    assert page.links == [f"#{name}" for name in page.ids]
    assert len(page.ids) == 9
    # One for accuracy, two confusions, two reliabilities, similarity, three rows, collapse, learning, tau.
    assert len(page.images) == 12
    for image in page.images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size[0] == pytest.approx(1.5 * int(image["width"]), abs=2)
        assert image["alt"]
    assert not re.search(r'(src|href)="(?!data:|#)', both.read_text())
    assert "<script" not in both.read_text()


def test_calibration_per_group(both, arb, plain):
    for label, folder in (("digits_imb005", plain), ("digits_imb005_arbloss_mixup", arb)):
        last = history(folder)[-1]["test"]
        (row,) = (row for row in Page(both).rows("ECE (%)") if row[0] == label)
        expected = [last["ece"]] + [
            last["ece_groups"][rule].get(group) for rule in ("index", "count") for group in ("many", "medium", "few")
        ]
        assert row[1:] == [compare.number(value) for value in expected]


def test_balance_metrics_are_those_of_the_classifier(both, arb):
    (row,) = (row for row in Page(both).rows("balance") if row[0] == "digits_imb005_arbloss_mixup")
    found = balance_metrics(content(arb)["state_dict_classifier"]["fc.weight"])
    assert row[1:] == [f"{found[key]:.4f}" for key in compare.BALANCE]


def test_the_decomposition_is_shown_where_there_is_one(both, arb):
    page = Page(both)
    (path,) = arb.glob("eval/*/decomposition.json")
    expected = json.loads(path.read_text())["rows"]
    rows = page.rows("run classifier")
    assert [row[1] for row in rows] == list(expected)
    assert [row[2] for row in rows] == [compare.number(row["top1"]) for row in expected.values()]
    assert page.lines["missing"] == ["digits_imb005: no decomposition; `eval.py ... decompose True` writes it."]


def test_a_run_of_an_older_version_says_what_it_did_not_record(older, tmp_path):
    page = made(older, out=tmp_path / "page.html")
    said = " ".join(page.lines["missing"])
    for option in ("`diagnostics: N`", "`nc_every: N`", "decompose True`"):
        assert option in said
    assert len(page.images) == 5
    found = {key: torch.from_numpy(np.load(older / "predictions" / "1.npz")[key]) for key in ("classes", "confidences")}
    targets = torch.from_numpy(np.load(older / "predictions" / "targets.npz")["targets"].astype(int))
    few = targets >= 7
    error = calibration_error(found["confidences"][few], found["classes"][few], targets[few])["ece"]
    (row,) = page.rows("ECE (%)")
    assert row[4] == f"{100 * error:.2f}"
    assert "nan" not in (tmp_path / "page.html").read_text().split("</style>")[1].split("data:image")[0]


def test_without_predictions_the_page_says_so(older, tmp_path):
    shutil.rmtree(older / "predictions")
    page = made(older, out=tmp_path / "page.html")
    assert sum("no predictions" in line for line in page.lines["missing"]) == 4
    assert len(page.images) == 2
    assert page.rows("run choice")[1][3] != "-"  # the cross-fitted best has its top-1
    assert page.rows("run choice")[1][4:] == ["-"] * 7


def test_runs_on_other_data_are_warned_of(plain, tmp_path):
    other = train(tmp_path, "num_epochs", 1, "subset_seed", 1)
    runs = compare.read_runs([plain, other])
    assert compare.differences(runs) == [
        "subset_seed differs (digits_imb005: 0; digits_imb005_arbloss_mixup: 1)",
    ]
    assert "Not comparable: subset_seed differs" in compare.warnings(runs)
    assert compare.compared(runs) == []


def test_another_test_set_is_warned_of(plain, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    targets = np.load(other / "predictions" / "targets.npz")["targets"]
    np.savez(other / "predictions" / "targets.npz", targets=targets[::-1])
    (line,) = compare.differences(compare.read_runs([plain, other]))
    assert "tested on other images" in line


def test_labels_tell_runs_apart(plain, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "copy")
    assert list(compare.read_runs([plain, copy])) == [plain.name, "copy"]
    cfg = load_config(copy / "config.yaml")
    (copy / "config.yaml").write_text(dump_config(cfg, seed=5))
    assert list(compare.read_runs([plain, copy])) == ["digits_imb005, seed 0", "digits_imb005, seed 5"]


def test_a_report_of_one_run_escapes_all_text_from_files(arb, tmp_path):
    folder = shutil.copytree(arb, tmp_path / "named")
    edit_checkpoint(folder, lambda stored: stored.update(class_names=[f"{SCRIPT} {n}" for n in range(10)]))
    write_text(folder / "config.yaml", dump_config(load_config(folder / "config.yaml"), name='a "b" <i>&'))
    page = made(folder, out=tmp_path / "page.html")
    said = (tmp_path / "page.html").read_text()
    assert "<script" not in said and "<i>" not in said
    assert html.escape(SCRIPT) in said
    (table,) = (table for table in page.tables if table[0][0] == "class")
    assert table[1][0].startswith(SCRIPT)
    assert any(f"class {SCRIPT}" in image["alt"] for image in page.images)
    assert "<h1>Report of a &quot;b&quot; &lt;i&gt;&amp;</h1>" in said
    assert len(page.lines["finding"]) == 2
    assert all("nothing is said of the paper" in line for line in page.lines["finding"])


# ---------------------------------------------------------------------------------------------------------------------
# Sentences follow from numbers


def numbers(attraction, repulsion, ratio, frequent):
    return compare.RowNumbers(attraction, repulsion, ratio, frequent, 1.0, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            numbers(1, 4, 20, 0.8),
            numbers(1, 1.5, 5, 0.6),
            ["80.0 % of the repulsion, which is the larger", "are more alike", "are closer", "this agrees with the"],
        ),
        (
            numbers(1, 1.5, 5, 0.4),
            numbers(1, 4, 20, 0.6),
            ["40.0 % of the repulsion, which is not", "are not more alike", "are not closer", "this does not agree"],
        ),
        (numbers(1, 1.5, 5, 0.6), numbers(1, 4, 20, 0.6), ["this agrees in part (1 of 3) with"]),
        (numbers(0, 1, np.inf, 0.6), numbers(1, 1, 20, 0.6), ["against infinitely many times it", "agrees with"]),
        (numbers(1, 4, 1, np.nan), numbers(1, 2, 1, np.nan), ["; this agrees with", "are closer"]),  # two classes
    ],
)
def test_claims_on_components_follow_the_numbers(before, after, words):
    said = "; ".join(compare.claims("ce", before, "arb", after))
    for word in words:
        assert word in said


def test_the_sentence_on_similarity_follows_the_numbers(arb, plain):
    runs = compare.read_runs([plain, arb])
    ce, other = runs
    small, large = ({key: value for key in compare.BALANCE} for value in (0.1, 0.2))
    agrees = compare.similarity_sentence(runs, {ce: large, other: small})
    assert f"under arb-loss ({other}) 3 of the 3 balance metrics that no scale changes" in agrees.lower()
    assert "agrees with the paper" in agrees and "the two differ in mixup too" in agrees
    contrary = compare.similarity_sentence(runs, {ce: small, other: large})
    assert "0 of the 3" in contrary and "does not agree with the paper" in contrary
    partly = compare.similarity_sentence(runs, {ce: large, other: {**large, "b_a": 0.1, "b_d": 0.1}})
    assert "agrees in part (1 of 3) with the paper" in partly
    equal = compare.similarity_sentence(runs, {ce: large, other: large})
    assert f"balance metrics of {other} and {ce} are equal" in equal and "the paper" not in equal


def test_the_sentence_on_similarity_compares_no_picture_with_rows_left_out(arb, plain):
    runs = compare.read_runs([plain, arb])
    balance = {label: balance_metrics(run.weight) for label, run in runs.items()}
    simplex = torch.eye(10, 64) - torch.cat([torch.full((10, 10), 0.1), torch.zeros(10, 54)], dim=1)
    for run in runs.values():
        run.weight.copy_(simplex)
    runs["digits_imb005"].weight[3] *= 1.5
    assert "in the picture the cells of digits_imb005_arbloss_mixup lie closer" in compare.similarity_sentence(
        runs, balance
    )
    runs["digits_imb005"].weight[0] = 0.5 * simplex[1]
    assert "lie closer together" not in compare.similarity_sentence(runs, balance)


def test_variants_of_the_loss_are_not_held_against_the_paper(arb, plain, tmp_path):
    other = shutil.copytree(arb, tmp_path / "weighted")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("loss: arb\n", "loss: weighted_arb\n"))
    assert compare.compared(compare.read_runs([plain, arb]))
    assert not compare.compared(compare.read_runs([plain, other]))


def test_the_sentence_on_similarity_names_rows_without_one(arb, plain):
    runs = compare.read_runs([plain, arb])
    weight = runs["digits_imb005"].weight
    weight.copy_(torch.eye(10, weight.shape[1]) - 0.1)
    weight[:, 10:] = 0
    balance = {label: balance_metrics(run.weight) for label, run in runs.items()}
    said = compare.similarity_sentence(runs, balance)
    assert "90 % of the cells of digits_imb005 lie between 1.00 and 1.00 times the ideal" in said
    assert "rows of digits_imb005," not in said
    weight[0] = 0.5 * weight[1]
    said = compare.similarity_sentence(runs, balance)
    assert "M is not drawn for 1 of the 10 rows of digits_imb005, whose dot products are not clearly" in said


def test_numbers_on_a_row_are_means_over_the_last_quarter():
    norms = np.zeros((5, 2, 5), np.float32)
    norms[:3] = 100
    norms[3:, 1] = [[4, 1, 9, 2, 3], [6, 1, 9, 4, 5]]  # the last two of five epochs; the row is class 2
    masses = np.array([[0, 0, 7, 0, 0]] * 3 + [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0]], np.float32)
    diagnostics = {
        "epochs": np.arange(5),
        "rows": np.array([0, 2]),
        "row_norms": norms,
        "class_counts": np.array([50, 40, 1, 60, 20]),
        "attraction_mass": masses,
        "repulsion_mass": 2 * masses,
        "repulsion_cosine": masses / 4,
    }
    found = compare.row_numbers(diagnostics, 2)
    # By frequency: class 3 (mean 3), 0 (5), 1 (1), 4 (4).
    assert found == compare.RowNumbers(9, 13, 5, pytest.approx(8 / 13), 1.5, 3, 0.375)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "config.yaml").unlink(), "is no run's folder, it has no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no epoch of this run was evaluated yet"),
        (lambda run: write_rows(run, [{"epoch": 0, "lr": 0.1, "train": {}}]), "no epoch of this run was evaluated yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n{}\n"), "metrics.jsonl, line 1: is no row of an epoch"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl: is damaged"),
        (lambda run: (run / "diagnostics.npz").write_bytes(b"PK\x03\x04"), "diagnostics.npz: is damaged"),
        (lambda run: np.savez(run / "diagnostics.npz", epochs=np.arange(3)), "without this file the page leaves out"),
        (lambda run: (run / "predictions" / "1.npz").write_bytes(b""), "1.npz: is damaged"),
        (lambda run: (run / "predictions" / "0.npz").write_bytes(b"PK"), "is damaged"),
        (
            lambda run: np.savez(run / "predictions" / "targets.npz", targets=np.full(400, 10)),
            "targets that are not in 0 to 9",
        ),
        (lambda run: (run / "ckps" / "current.pth.tar").unlink(), "no such checkpoint file"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(class_counts=None)), "current.pth.tar: is"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(class_names=["a"])), "class_names"),
        (lambda run: next(run.glob("eval/*/decomposition.json")).write_text('{"tau": {}}'), "decomposition.json: is"),
        (lambda run: edit_decomposition(run, lambda found: found["tau"].pop("best")), "decomposition.json: is"),
        (lambda run: edit_decomposition(run, lambda found: found["tau"].update(best=0.5)), "decomposition.json: is"),
        (
            lambda run: edit_decomposition(run, lambda found: found["rows"].update(x={"top1": "9"})),
            "decomposition.json: is",
        ),
        (lambda run: edit_last_row(run, nc={"nc1": "small"}), "metrics.jsonl, line 2: is no row of an epoch"),
        (lambda run: edit_last_row(run, epoch="../../x"), "metrics.jsonl, line 2: is no row of an epoch"),
        (lambda run: edit_last_row(run, test=[1]), "metrics.jsonl, line 2: is no row of an epoch"),
        (lambda run: edit_last_row(run, test={"top1": 5.0, "ece_groups": [1]}), "metrics.jsonl, line 2: is no row"),
        (lambda run: edit_arrays(run, rows=np.array([[9, 5, 0]])), "diagnostics.npz: is damaged"),
        (lambda run: edit_arrays(run, rows=np.array([9.5, 5, 0])), "diagnostics.npz: is damaged"),
        (lambda run: edit_arrays(run, rows=np.array([9, 9, 0])), "diagnostics.npz: is damaged"),
        (lambda run: edit_arrays(run, repulsion_mass=np.full((2, 10), "x")), "diagnostics.npz: is damaged"),
        (lambda run: edit_arrays(run, epochs=np.array([print] * 2, dtype=object)), "diagnostics.npz: is damaged"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(fingerprint=torch.ones(1))), "fingerprint"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(class_counts=torch.ones(10))), "class_counts"),
    ],
)
def test_damaged_runs_are_one_line(damage, expected, arb, tmp_path, capsys):
    run = shutil.copytree(arb, tmp_path / "run")
    rows = history(run)
    if expected == "is damaged":  # of an epoch that the cross-fitted choice needs
        write_rows(run, [rows[0] | {"halves": [100.0, 100.0]}, *rows[1:]])
    damage(run)
    result = failure(capsys, compare.main, run, "--out", tmp_path / "page.html")
    assert (result.code, len(result.lines)) == (2, 1)
    assert expected in result.said and str(run) in result.said
    assert not (tmp_path / "page.html").exists()


def test_a_last_row_that_was_cut_short_is_left_out(older):
    with (older / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lr"')
    assert [row["epoch"] for row in compare.read_run(older).rows] == [0, 1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["RUN", "./RUN/.", "--out", "page.html"], "is given twice"),
        (["RUN", "--out", "none/page.html"], "--out: there is no folder"),
        (["RUN", "--out", "."], "is a folder"),
        (["RUN"], "command line: the following arguments are required: --out"),
        (["--out", "page.html"], "command line: the following arguments are required: RUN"),
    ],
)
def test_bad_command_lines_are_one_line(words, expected, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(plain)
    result = failure(capsys, compare.main, *words)
    assert (result.code, len(result.lines)) == (2, 1)
    assert expected in result.said
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


@pytest.mark.skipif(resource is None, reason="needs limits on the size of files")
def test_a_page_is_written_whole_or_not_at_all(older, tmp_path, capsys):
    shutil.rmtree(older / "predictions")  # the fewer pictures, the faster
    out = tmp_path / "page.html"
    out.write_text("the old page")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        result = failure(capsys, compare.main, older, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (result.code, len(result.lines)) == (2, 1)
    assert "page.html cannot be written: File too large" in result.said
    assert out.read_text() == "the old page"
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def browse(page: Path, scratch: Path) -> tuple[list[str], list[int]]:
    """(lines that went to the console, [pictures, pictures that have a size]) of a page in a real browser.

    The probe stands in a copy, so that the page itself is looked at as it is.
    """
    probe = (
        "<script>addEventListener('load', () => { const all = [...document.images];"
        "document.body.insertAdjacentText('beforeend',"
        " `PICTURES ${all.length} ${all.filter(i => i.naturalWidth > 0).length} END`); });</script>"
    )
    copy = scratch / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8") + probe, encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    options += [f"--user-data-dir={scratch / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, copy.as_uri()], capture_output=True, text=True, timeout=600)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.findall(r"PICTURES (\d+) (\d+) END", done.stdout)
    assert found, done.stderr
    return said, [int(count) for count in found[-1]]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_picture_and_has_nothing_to_say(both, tmp_path):
    assert browse(both, tmp_path) == ([], [12, 12])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_sees_a_broken_picture_and_a_script_error(both, tmp_path):
    said = both.read_text()
    first = said.index("data:image/png;base64,")
    broken = f"{said[:first]}data:image/png;base64,AAAA{said[first + 2000 :]}<script>nothing.here()</script>"
    (tmp_path / "broken.html").write_text(broken)
    console, pictures = browse(tmp_path / "broken.html", tmp_path)
    assert len(console) == 1 and "nothing is not defined" in console[0]
    assert pictures == [12, 11]


# ---------------------------------------------------------------------------------------------------------------------
# Size


def made_up_run(folder: Path, run: Path, classes: int, width: int) -> Path:
    """A run in the real formats whose numbers are made up: for what a page costs, not for what it says."""
    draw = np.random.default_rng(0)
    counts = torch.from_numpy(np.round(1000 * 0.002 ** (np.arange(classes) / (classes - 1))).astype(np.int64))
    folder.mkdir()
    cfg = load_config(run / "config.yaml")
    changes = {"dataset": "ina2018", "backbone": "resnet50", "num_classes": classes, "imb_factor": None}
    (folder / "config.yaml").write_text(dump_config(cfg, **changes))
    targets = torch.arange(classes).repeat_interleave(3)
    groups = shot_groups(None, [[0, 842], [842, 4543], [4543, classes]], counts)
    rows = []
    for row in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        right = torch.from_numpy(draw.random(len(targets)) < 0.6)
        others = torch.from_numpy(draw.integers(0, classes, len(targets)))
        confidences = torch.from_numpy(draw.random(len(targets), np.float32))
        guessed = torch.where(right, targets, others)
        predictions = Predictions(guessed, confidences, right, confidences, targets)
        save_predictions(folder / "predictions", row["epoch"], predictions)
        rows.append(row | {"test": report(predictions, counts, groups), "halves": half_accuracies(predictions)})
    write_rows(folder, rows)
    weight = torch.from_numpy(draw.normal(size=(classes, width)).astype(np.float32))
    stored = content(run) | {
        "class_counts": counts,
        "class_names": [f"species {n}" for n in range(classes)],
        "state_dict_classifier": {"fc.weight": weight - weight.mean(dim=0), "fc.bias": torch.zeros(classes)},
    }
    (folder / "ckps").mkdir()
    torch.save(stored, folder / "ckps" / "current.pth.tar")
    names = ("attraction_mass", "repulsion_mass", "repulsion_cosine")
    by_class = {key: draw.random((200, classes), np.float32) for key in names}
    np.savez(
        folder / "diagnostics.npz",
        epochs=np.arange(200),
        rows=np.array([classes - 1, classes // 2, 0]),
        row_norms=draw.random((200, 3, classes), np.float32),
        class_counts=counts.numpy(),
        **by_class,
    )
    return folder


@pytest.mark.slow
def test_a_page_of_8142_classes_takes_less_than_a_minute(arb, tmp_path):
    run = made_up_run(tmp_path / "large", arb, 8142, 2048)
    began = time.process_time()
    page = made(run, out=tmp_path / "page.html")
    assert time.process_time() - began < 60
    assert len(page.images) == 9
    assert (tmp_path / "page.html").stat().st_size < 5e6
