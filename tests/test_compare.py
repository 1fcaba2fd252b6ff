"""The page of runs: made by the real command from runs of the real script, and opened in a real browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from methods.neural_collapse import balance_metrics
from models.classifier import CLASSIFIERS
from tests.conftest import CE, content, copy_of, current, failure, history, train
from utils.compare import findings, read, sections
from utils.compare.page import main
from utils.config import dump_config, load_config
from utils.files import write_text
from utils.metrics import Predictions, calibration_error, half_accuracies, report, shot_groups
from utils.report.text import save_predictions

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

CHROMIUM = shutil.which("chromium")
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def arb(measured, tmp_path_factory) -> Path:
    """ARB-Loss and mixup, with everything that can be recorded."""
    folder = copy_of(measured, tmp_path_factory.mktemp("copies"))
    eval_script.main(["--cfg", str(folder / "config.yaml"), "resume", str(current(folder)), "decompose", "True"])
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Cross-entropy on the same images, without mixup."""
    return train(tmp_path_factory.mktemp("saved"), "num_epochs", 2, "diagnostics", 2, "nc_every", 2, cfg=CE)


@pytest.fixture(scope="module")
def both(arb, plain, tmp_path_factory) -> Path:
    """The page of the two."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    main([str(plain), str(arb), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def runs(arb, plain) -> dict[str, read.Run]:
    return read.read_runs([plain, arb])


@pytest.fixture(scope="module")
def old(plain, tmp_path_factory) -> Path:
    """The run as earlier versions wrote it, with names that are hostile to HTML."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("old") / "older_20250101000000")
    (folder / "diagnostics.npz").unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("nc", None)
        row["test"].pop("ece_groups")
    write_rows(folder, rows)
    edit_checkpoint(folder, lambda stored: stored.update(class_names=[f"{SCRIPT} {n}" for n in range(10)]))
    edit_config(folder, name='a "b" <i>&')
    options = {"diagnostics", "diagnostics_rows", "nc_every", "decompose"}
    kept = [line for line in (folder / "config.yaml").read_text().splitlines() if line.split(":")[0] not in options]
    (folder / "config.yaml").write_text("\n".join(kept))
    return folder


@pytest.fixture(scope="module")
def old_page(old, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "old.html"
    main([str(old), "--out", str(out)])
    return out


@pytest.fixture
def older(old, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(old, tmp_path / old.name)


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_config(folder, **changes):
    write_text(folder / "config.yaml", dump_config(load_config(folder / "config.yaml"), **changes))


def edit_checkpoint(folder, change):
    stored = content(folder)
    change(stored)
    torch.save(stored, current(folder))


def edit_last_row(folder, **changes):
    *rows, last = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    write_rows(folder, [*rows, last | changes])


def edit_arrays(folder, **changes):
    stored = dict(np.load(folder / "diagnostics.npz"))
    np.savez(folder / "diagnostics.npz", **(stored | changes))


def edit_decomposition(folder):
    """A curve shorter than its values."""
    path = next(folder.glob("eval/*/decomposition.json"))
    found = json.loads(path.read_text())
    found["tau"]["few"].pop()
    path.write_text(json.dumps(found))


class Page(HTMLParser):
    """Tables as rows of cells, pictures, headings, and the text of paragraphs by class."""

    def __init__(self, path: Path):
        super().__init__()
        self.tables, self.images, self.ids, self.links, self.headings = [], [], [], [], []
        self.lines: dict[str, list[str]] = {}
        self._into = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "p", "h1"):
            if tag == "p":
                self._into = self.lines.setdefault(found.get("class", ""), [])
            else:
                self._into = self.headings if tag == "h1" else self.tables[-1][-1]
            self._into.append("")
        elif tag == "img":
            self.images.append(found)
        elif tag == "a":
            self.links.append(found["href"])
        elif tag == "section":
            self.ids.append(found["id"])

    def handle_endtag(self, tag):
        if tag in ("td", "th", "p", "h1"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data

    def rows(self, first: str) -> list[list[str]]:
        """Of the table whose head begins with ``first``, cells joined."""
        (found,) = (table for table in self.tables if " ".join(table[0]).startswith(first))
        return found[1:]


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


def test_the_table_has_the_runs_own_numbers(both, arb, plain):
    rows, labels = Page(both).rows("run choice"), ("digits_imb005", "digits_imb005_arbloss_mixup")
    choices = ("last epoch", "cross-fitted best", "best on the test set")
    assert [row[:2] for row in rows] == [[label, choice] for label in labels for choice in choices]
    for folder, mine in ((plain, rows[:3]), (arb, rows[3:])):
        summary = json.loads((folder / "summary.json").read_text())
        for row, found in zip(mine, summary.values(), strict=True):
            assert row[2].split(", ") == [str(epoch) for epoch in dict.fromkeys(found["epochs"])]
            by_index = [found.get(key) for key in ("top1", "many", "medium", "few", "ece")]
            assert [row[3], *row[4:7], row[10]] == [sections.number(value) for value in by_index]
        last = history(folder)[-1]["test"]
        by_count = [last["shots"]["count"].get(group) for group in ("many", "medium", "few")]
        assert mine[0][7:10] == [sections.number(value) for value in by_count]


def test_group_sizes_and_training_are_said(both):
    page, said = Page(both), " ".join(both.read_text().split())
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
        assert row[1:] == [sections.number(value) for value in expected]


def test_balance_metrics_are_those_of_the_classifier(both, arb):
    (row,) = (row for row in Page(both).rows("balance") if row[0] == "digits_imb005_arbloss_mixup")
    found = balance_metrics(content(arb)["state_dict_classifier"]["fc.weight"])
    assert row[1:] == [f"{found[key]:.4f}" for key in sections.BALANCE]


def test_the_decomposition_is_shown(both, arb):
    page = Page(both)
    (path,) = arb.glob("eval/*/decomposition.json")
    expected = json.loads(path.read_text())["rows"]
    rows = page.rows("run classifier")
    assert [row[1] for row in rows] == list(expected)
    assert [row[2] for row in rows] == [sections.number(row["top1"]) for row in expected.values()]
    (missing,) = page.lines["missing"]
    assert missing.startswith("digits_imb005: no decomposition")


def test_a_run_of_an_older_version_says_what_it_did_not_record(old, old_page):
    page = Page(old_page)
    said = " ".join(page.lines["missing"])
    for option in ("`diagnostics: N`", "`nc_every: N`", "decompose True`"):
        assert option in said
    assert len(page.images) == 5
    found = {key: torch.from_numpy(np.load(old / "predictions" / "1.npz")[key]) for key in ("classes", "confidences")}
    targets = torch.from_numpy(np.load(old / "predictions" / "targets.npz")["targets"].astype(int))
    few = targets >= 7
    error = calibration_error(found["confidences"][few], found["classes"][few], targets[few])["ece"]
    (row,) = page.rows("ECE (%)")
    assert row[4] == f"{100 * error:.2f}"
    assert "nan" not in old_page.read_text().split("</style>")[1].split("data:image")[0]


def test_all_text_from_files_is_escaped(old_page):
    page, said = Page(old_page), old_page.read_text()
    assert "<script" not in said and "<i>" not in said
    assert page.headings == ['Report of a "b" <i>&']
    (table,) = (table for table in page.tables if table[0][0] == "class")
    assert table[1][0].startswith(SCRIPT)
    assert any('of a "b" <i>&' in image["alt"] for image in page.images)
    (finding,) = page.lines["finding"]
    assert 'rows of a "b" <i>&' in finding or 'cells of a "b" <i>&' in finding
    assert "nothing is said of the paper" in finding


def test_without_predictions_sections_say_so(older):
    shutil.rmtree(older / "predictions")
    runs = read.read_runs([older])
    for section in (sections.results, sections.classes, sections.confusion, sections.calibration):
        found = section(runs)
        assert "no predictions" in found["missing"][0]
        assert not found.get("pictures") and not found.get("extremes")
    row = sections.results(runs)["table"].rows[1]
    assert row[3] != "-" and row[4:] == ["-"] * 7  # the cross-fitted best has its top-1


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_weight_is_the_classifiers_rows(kind, older):
    classifier = CLASSIFIERS[kind](64, 10, 20.0)
    edit_checkpoint(older, lambda stored: stored.update(state_dict_classifier=classifier.state_dict()))
    edit_config(older, classifier=kind, cosine_scale=20.0, loss="ce")
    assert torch.equal(read.read_run(older).weight, classifier.rows().detach())


# ---------------------------------------------------------------------------------------------------------------------
# Which runs can be compared


@pytest.fixture
def other(plain, tmp_path) -> Path:
    """A copy of the run with cross-entropy, to change."""
    return shutil.copytree(plain, tmp_path / "other")


def test_runs_on_other_data_are_warned_of(plain, other):
    edit_config(other, subset_seed=1, name="other")
    runs = read.read_runs([plain, other])
    assert read.differences(runs) == ["subset_seed differs (digits_imb005: 0; other: 1)"]
    edit_config(other, subset_seed=0, loss="arb")
    edit_checkpoint(other, lambda stored: stored.update(fingerprint="another"))
    runs = read.read_runs([plain, other])
    assert "different lists or labels" in read.differences(runs)[0]
    assert read.loss_pairs(runs) == []
    edit_checkpoint(other, lambda stored: stored.update(class_counts=stored["class_counts"] + 1))
    assert "different numbers of training images" in read.differences(read.read_runs([plain, other]))[0]
    targets = np.load(other / "predictions" / "targets.npz")["targets"]
    np.savez(other / "predictions" / "targets.npz", targets=targets[::-1])
    assert any("tested on different images" in line for line in read.differences(read.read_runs([plain, other])))


def test_variants_of_the_loss_are_not_held_against_the_paper(runs, plain, other):
    assert read.loss_pairs(runs) == [tuple(runs)]
    edit_config(other, loss="weighted_arb")
    assert not read.loss_pairs(read.read_runs([plain, other]))


def test_labels_tell_runs_apart_and_classes_without_names_have_indices(plain, other):
    assert list(read.read_runs([plain, other])) == [plain.name, "other"]
    edit_config(other, seed=5)
    assert list(read.read_runs([plain, other])) == ["digits_imb005, seed 0", "digits_imb005, seed 5"]
    edit_checkpoint(other, lambda stored: stored.pop("class_names"))
    assert read.read_run(other).class_names == [str(n) for n in range(10)]


def test_the_page_warns_of_runs_on_other_data(older, tmp_path):
    shutil.rmtree(older / "predictions")  # fewer figures
    other = shutil.copytree(older, tmp_path / "other")
    edit_config(other, imb_factor=0.1, name="other")
    main([str(older), str(other), "--out", str(tmp_path / "page.html")])
    (line,) = Page(tmp_path / "page.html").lines["warning"]
    assert line.startswith("Not comparable: imb_factor differs")


# ---------------------------------------------------------------------------------------------------------------------
# Sentences follow from numbers


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((1, 4, 20, 0.8), (1, 1.5, 5, 0.6), "80.0 % of the repulsion; is the larger part; are more even; are closer"),
        ((1, 4, 20, 0.8), (1, 1.5, 5, 0.6), "this agrees with"),
        ((1, 1.5, 5, 0.4), (1, 4, 20, 0.6), "is not the larger part; are not more even; are not closer"),
        ((1, 1.5, 5, 0.4), (1, 4, 20, 0.6), "this does not agree with"),
        ((1, 1.5, 5, 0.6), (1, 4, 20, 0.6), "this agrees in part (1 of 3) with"),
        ((0, 1, np.inf, 0.6), (1, 1, 20, 0.6), "compared with infinitely many times; agrees with"),
        ((1, 4, 1, np.nan), (1, 2, 1, np.nan), "this agrees with; are closer"),  # two classes
    ],
)
def test_claims_on_components_follow_the_numbers(before, after, words):
    """Numbers: attraction, repulsion, their ratio, and the frequent classes' share."""
    numbers = [findings.RowNumbers(*four, 1.0, 1.0) for four in (before, after)]
    said = "; ".join(findings.claims("ce", numbers[0], "arb", numbers[1]))
    for word in words.split("; "):
        assert word in said


def test_the_sentence_on_similarity_follows_the_balance_metrics(runs):
    ce, other = runs
    small, large = ({key: value for key in sections.BALANCE} for value in (0.1, 0.2))
    agrees = findings.similarity_sentence(runs, {ce: large, other: small})
    assert f"under arb-loss ({other}) 3 of the 3 scale-invariant balance metrics" in agrees.lower()
    assert "agrees with the paper" in agrees and "also differ in mixup" in agrees
    contrary = findings.similarity_sentence(runs, {ce: small, other: large})
    assert "0 of the 3" in contrary and "does not agree with the paper" in contrary
    partly = findings.similarity_sentence(runs, {ce: large, other: {**large, "b_a": 0.1, "b_d": 0.1}})
    assert "agrees in part (1 of 3) with the paper" in partly
    equal = findings.similarity_sentence(runs, {ce: large, other: large})
    assert f"balance metrics of {other} and {ce} are equal" in equal and "the paper" not in equal


def simplex_runs(runs, changes):
    """The runs with simplex classifiers; the first one's with ``changes`` {row: factor}, or {row: (factor, row)}."""
    simplex = torch.eye(10, 64) - torch.cat([torch.full((10, 10), 0.1), torch.zeros(10, 54)], dim=1)
    first = simplex.clone()
    for row, (factor, source) in changes.items():
        first[row] = factor * simplex[source]
    weights = (first, simplex)
    return {label: replace(run, weight=weight) for (label, run), weight in zip(runs.items(), weights, strict=True)}


def test_the_sentence_on_similarity_counts_undefined_rows_and_compares_no_figure_with_them(runs):
    def sentence(changes):
        changed = simplex_runs(runs, changes)
        return findings.similarity_sentence(
            changed, {label: balance_metrics(run.weight) for label, run in changed.items()}
        )

    said = sentence({})
    assert "90 % of the cells of digits_imb005 lie between 1.00 and 1.00 times the ideal" in said
    assert "undefined" not in said
    said = sentence({0: (0.5, 1)})
    assert "M is undefined for 1 of the 10 rows of digits_imb005, whose dot products" in said
    assert "the cells of digits_imb005_arbloss_mixup lie closer" in sentence({3: (1.5, 3)})
    assert "lie closer together" not in sentence({3: (1.5, 3), 0: (0.5, 1)})


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
    found = findings.row_numbers(diagnostics, 2)
    # By frequency: class 3 (mean 3), 0 (5), 1 (1), 4 (4).
    assert found == findings.RowNumbers(9, 13, 5, pytest.approx(8 / 13), 1.5, 3, 0.375)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        ({"a": 1}, {"a": int, "b?": int}, ""),
        ({}, {"a": int}, "a is missing"),
        ({"a": True}, {"a": int}, "a is a bool"),
        ({"a": {"b": {"c": "1.5"}}}, {"a": {str: {str: int | float}}}, "c is a str"),
        ([1], {"a": int}, "it is a list"),
        ({"a": np.zeros((2, 3)), "b": [1, 2, 3]}, {"a": "float NC", "b": "count C"}, ""),
        ({"a": np.zeros((2, 3)), "b": [1, 2]}, {"a": "float NC", "b": "count C"}, "C is 3"),
        ({"a": np.array(["x"])}, {"a": "float N"}, "not float [N]"),
        ({"a": np.array([-1])}, {"a": "count N"}, "values below 0"),
        ({"a": np.array([9, 10])}, {"a": "class N"}, "above 9"),
        ({"a": np.array([np.nan])}, {"a": "finite N"}, "not finite"),
        ({"a": ["x", "y"]}, {"a": "text N"}, ""),
    ],
)
def test_schemas(value, schema, problem):
    sizes = {} if "C" in str(schema) else {"C": 10}
    if not problem:
        read.check(value, schema, sizes)
        return
    with pytest.raises(ValueError, match=re.escape(problem)):
        read.check(value, schema, sizes)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "config.yaml").unlink(), "not a run's folder"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no epoch of this run was evaluated yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n{}\n"), "metrics.jsonl, line 1: is not a row"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl: is damaged"),
        (lambda run: edit_last_row(run, epoch="../../x"), "metrics.jsonl, line 2: is not a row of an epoch"),
        (lambda run: edit_last_row(run, test={"top1": 5.0, "shots": {}}, halves=None), "metrics.jsonl, line 2"),
        (lambda run: (run / "diagnostics.npz").write_bytes(b"PK\x03\x04"), "diagnostics.npz: is damaged"),
        (lambda run: edit_arrays(run, rows=np.array([9, 5, 10])), "diagnostics.npz: is damaged"),
        (lambda run: edit_arrays(run, epochs=np.array([print] * 2, dtype=object)), "diagnostics.npz: is damaged"),
        (lambda run: (run / "predictions" / "0.npz").write_bytes(b"PK"), "0.npz: is damaged"),
        (lambda run: np.savez(run / "predictions" / "targets.npz", targets=np.full(400, 10)), "above 9"),
        (lambda run: np.savez(run / "predictions" / "targets.npz", targets=np.zeros(3, np.int16)), "1.npz: is damaged"),
        (lambda run: (run / "ckps" / "current.pth.tar").unlink(), "no such checkpoint file"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(class_names=["a"])), "class_names"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(class_counts=torch.ones(10))), "class_counts"),
        (lambda run: edit_checkpoint(run, lambda stored: stored.update(environment={"processes": []})), "processes"),
        (lambda run: edit_config(run, classifier="simplex", loss="ce"), "current.pth.tar: is damaged"),
        (lambda run: edit_decomposition(run), "decomposition.json: is"),
    ],
)
def test_damaged_runs_are_one_line(damage, expected, arb, tmp_path, capsys):
    run = shutil.copytree(arb, tmp_path / "run")
    rows = history(run)
    if "0.npz" in expected:  # needed where the halves choose another epoch than the last
        write_rows(run, [rows[0] | {"halves": [100.0, 100.0]}, *rows[1:]])
    damage(run)
    result = failure(capsys, main, run, "--out", tmp_path / "page.html")
    assert (result.code, len(result.lines)) == (2, 1)
    assert expected in result.said and str(run) in result.said
    assert not (tmp_path / "page.html").exists()


def test_a_last_row_that_was_cut_short_is_left_out(older):
    with (older / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lr"')
    assert [row["epoch"] for row in read.read_run(older).rows] == [0, 1]


def test_of_several_folders_those_that_have_not_ended_are_left_out(older, plain, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "eval").mkdir()
    edit_config(older, num_epochs=9)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("lrr: 1")
    folders = [tmp_path / "notes.txt", plain, tmp_path / "eval", older, tmp_path / "broken"]
    main([*map(str, folders), "--out", str(tmp_path / "page.html")])
    _, *said, broken = capsys.readouterr().out.splitlines()
    assert said == [
        f"left out: {tmp_path / 'notes.txt'}: is not a run's folder",
        f"left out: {tmp_path / 'eval'}: is not a run's folder",
        f"left out: {older}: 2 of 9 epochs are done",
    ]
    assert broken.startswith(
        f"left out: {tmp_path / 'broken'}: {tmp_path / 'broken' / 'config.yaml'}: unknown key 'lrr'"
    )
    assert read.ended_runs([older]) == ([older], [])
    assert read.ended_runs([tmp_path / "none", older])[0] == [tmp_path / "none"]


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
    result = failure(capsys, main, *words)
    assert (result.code, len(result.lines)) == (2, 1)
    assert expected in result.said
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


@pytest.mark.skipif(resource is None, reason="needs limits on the size of files")
def test_a_page_is_written_whole_or_not_at_all(older, tmp_path, capsys):
    shutil.rmtree(older / "predictions")  # fewer figures
    out = tmp_path / "page.html"
    out.write_text("the old page")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        result = failure(capsys, main, older, "--out", out)
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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_picture_and_reports_no_error(both, tmp_path):
    assert browse(both, tmp_path) == ([], [12, 12])


# ---------------------------------------------------------------------------------------------------------------------
# Size


def made_up_run(folder: Path, run: Path, classes: int, width: int) -> Path:
    """Write a run in the real formats with random numbers, to measure what a page costs."""
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
def test_a_page_of_8142_classes(arb, tmp_path):
    run, out = made_up_run(tmp_path / "large", arb, 8142, 2048), tmp_path / "page.html"
    main([str(run), "--out", str(out)])
    assert len(Page(out).images) == 9
    assert out.stat().st_size < 5e6
