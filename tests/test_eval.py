"""Evaluation of checkpoints by the real script."""

import contextlib
import csv
import io
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestCentroid

import eval as eval_script
from datasets import build_data
from models import build_model
from tests.conftest import ARB, SHORT, copy_of, current, failure, history, in_ranks, log_of
from utils.checkpoint import load_weights

LINES = re.compile(
    r"\* Acc@1 (\d+\.\d{3})% Acc@5 (\d+\.\d{3})% HAcc (\d+\.\d{3})% MAcc (\d+\.\d{3})% TAcc (\d+\.\d{3})%\.\n"
    r"\* ECE   (\d+\.\d{3})%\.\n\Z"
)


def evaluate(*arguments: object) -> str:
    """What the script writes to standard output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        eval_script.main(["--cfg", ARB, *SHORT, *map(str, arguments)])
    return said.getvalue()


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """The last checkpoint of a copy of the finished run, which the script finds: what was said, copy, and report."""
    run = copy_of(finished, tmp_path_factory.mktemp("evaluated"))
    said = evaluate("num_epochs", 2, "resume", "auto", "save_dir", run.parent)
    return SimpleNamespace(said=said, run=run, report=run / "eval" / "current")


def test_it_ends_with_the_training_logs_last_lines(evaluated):
    last = LINES.search(evaluated.said).group().splitlines()
    assert last == [line.split(" ", 2)[2] for line in log_of(evaluated.run).splitlines() if "* " in line][-2:]


def test_the_report_lies_in_the_runs_folder(evaluated):
    pictures = {path.stem: Image.open(path) for path in evaluated.report.glob("*.png")}
    assert set(pictures) == {"class_accuracy", "confusion", "reliability", "similarity"}
    assert all(len(picture.convert("RGB").getcolors(10**6)) > 5 for picture in pictures.values())
    metrics = json.loads((evaluated.report / "metrics.json").read_text())
    rows = list(csv.DictReader((evaluated.report / "per_class.csv").open()))
    assert float(LINES.search(evaluated.said).group(1)) == pytest.approx(metrics["top1"], abs=5e-4)
    assert [row["name"] for row in rows] == [str(digit) for digit in range(10)]
    assert sum(float(row["top1_percent"]) for row in rows) / 10 == pytest.approx(metrics["macro"], abs=1e-3)
    assert [int(row["train_images"]) for row in rows][:3] == [138, 102, 73]
    expected = {"top1", "top5", "many", "medium", "few", "macro", "worst_class", "nll", "ece", "mce", "shots"}
    assert expected <= set(metrics)
    assert set(metrics["shots"]) == {"index", "count"}
    assert "worst class" in evaluated.said


def test_a_file_in_mislas_format_gives_the_same_numbers_in_a_folder_of_its_own(evaluated, tmp_path):
    """The headline's groups are by count this time."""
    own = torch.load(current(evaluated.run), weights_only=True)
    foreign = {
        "epoch": 2,
        "state_dict_model": {f"module.{key}": value for key, value in own["state_dict_model"].items()},
        "state_dict_classifier": {f"module.{key}": value for key, value in own["state_dict_classifier"].items()},
        "best_acc1": own["best_acc1"],
    }
    torch.save(foreign, tmp_path / "mislas.pth.tar")
    said = evaluate("resume", tmp_path / "mislas.pth.tar", "save_dir", tmp_path / "saved", "shots", "count")
    ours, theirs = (LINES.search(text) for text in (evaluated.said, said))
    assert ours.group(1, 2, 6) == theirs.group(1, 2, 6)
    (folder,) = (tmp_path / "saved").iterdir()
    assert folder.name.startswith("digits_imb005_arbloss_mixup_eval_")
    shots = json.loads((folder / "metrics.json").read_text())["shots"]
    assert shots == json.loads((evaluated.report / "metrics.json").read_text())["shots"]
    assert float(theirs.group(3)) == pytest.approx(shots["count"]["many"], abs=5e-4)
    assert "classes by count: many 2, medium 4, few 4" in said


def test_calibration_per_group_is_reported_and_shown(evaluated):
    errors = json.loads((evaluated.report / "metrics.json").read_text())["ece_groups"]
    assert list(errors) == ["index", "count"]
    assert all(set(by_name) == {"many", "medium", "few"} for by_name in errors.values())
    assert errors == history(evaluated.run)[-1]["test"]["ece_groups"]
    assert f"\nECE by index: many {errors['index']['many']:.2f}, medium " in evaluated.said
    assert not (evaluated.report / "decomposition.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Representation or classifier?


DECOMPOSE = ["imb_factor", 0.5, "decompose", True]  # more training images than one batch has


@pytest.fixture(scope="module")
def decomposed(finished, tmp_path_factory):
    """What the script says and writes with ``decompose True``, its folder, and the same run's features."""
    folder = copy_of(finished, tmp_path_factory.mktemp("decomposed"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fit that does not converge says so by a warning
        said = evaluate("resume", current(folder), *DECOMPOSE)
    report = folder / "eval" / "current"
    return SimpleNamespace(
        said=said,
        folder=folder,
        metrics=json.loads((report / "metrics.json").read_text()),
        text=(report / "decomposition.json").read_text(),
        found=json.loads((report / "decomposition.json").read_text()),
    )


@pytest.fixture(scope="module")
def features(finished):
    """Features and targets of the training images and of the test images, and the logits of the latter."""
    data = build_data("digits", "", imb_factor=0.5, image_size=8)
    model = build_model("digits", "resnet8", data.num_classes).to(memory_format=torch.channels_last).eval()
    load_weights(model, current(finished))
    found = SimpleNamespace(class_counts=data.class_counts.numpy())
    with torch.no_grad():
        for name, loader in (("train", data.plain_train_loader), ("test", data.test_loader)):
            logits, parts, targets = zip(
                *((*model(images, with_features=True), labels) for images, labels in loader(torch.device("cpu"))),
                strict=True,
            )
            columns = (torch.cat(column).numpy() for column in (parts, targets, logits))
            setattr(found, name, tuple(columns))
    return found


def test_the_rows_begin_with_the_model_and_the_last_two_lines_stay_last(decomposed):
    row = decomposed.found["rows"]["model"]
    assert row == {key: decomposed.metrics[key] for key in ("top1", "many", "medium", "few")}
    zero = decomposed.found["tau"]["values"].index(0)
    assert decomposed.found["tau"]["top1"][zero] == decomposed.metrics["top1"]
    assert LINES.search(decomposed.said)
    assert decomposed.said.index("the same features") > decomposed.said.index("groups by index")
    for label, row in decomposed.found["rows"].items():
        assert re.search(rf"^{re.escape(label)} +{row['top1']:.2f} +{row['many']:.2f} ", decomposed.said, re.M)


def test_other_data_than_the_checkpoints_own_are_named(decomposed):
    assert "note: trained with imb_factor 0.05, but this configuration says 0.5" in decomposed.said


def test_logit_adjustment_and_nearest_mean_agree_with_direct_computations(decomposed, features):
    (inputs, labels, _), (tested, targets, logits) = features.train, features.test
    few, prior = np.isin(targets, [7, 8, 9]), features.class_counts / features.class_counts.sum()
    curve = decomposed.found["tau"]
    for tau, top1, of_few in zip(curve["values"], curve["top1"], curve["few"], strict=True):
        hits = (logits - tau * np.log(prior)).argmax(axis=1) == targets
        assert top1 == pytest.approx(100 * hits.mean(), abs=0.51)  # two images: last bits differ with the threads
        assert of_few == pytest.approx(100 * hits[few].mean(), abs=1.7)
    nearest = NearestCentroid().fit(inputs, labels).predict(tested)
    row = decomposed.found["rows"]["nearest class mean"]
    assert row["top1"] == pytest.approx(100 * (nearest == targets).mean(), abs=0.51)
    assert row["few"] == pytest.approx(100 * (nearest == targets)[few].mean(), abs=1.7)


def evaluate_in_rank(rank: int, *arguments: object) -> None:
    eval_script.main(["--cfg", ARB, *SHORT, "device", "cpu", *map(str, arguments)])


def test_two_processes_write_the_same_file(decomposed, tmp_path):
    """There are two batches of training images, one for each process, and one of test images."""
    checkpoint = shutil.copy(current(decomposed.folder), decomposed.folder / "ckps" / "again.pth.tar")
    first, second = in_ranks(tmp_path, evaluate_in_rank, "resume", checkpoint, *DECOMPOSE)
    assert (decomposed.folder / "eval" / "again" / "decomposition.json").read_text() == decomposed.text
    assert first.count("nearest class mean") == 1
    assert LINES.search(first).group() == LINES.search(decomposed.said).group()
    assert second == ""


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_figure_that_fails_does_not_end_the_evaluation(evaluated, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(eval_script.plots, "confusion_figure", fail)
    with pytest.warns(UserWarning, match="a figure is left out .RuntimeError: no fonts."):
        assert LINES.search(evaluate("resume", current(evaluated.run)))


def test_auto_finds_only_this_configuration(evaluated, capsys):
    arguments = ["--cfg", ARB, *SHORT, "num_epochs", 3, "resume", "auto", "save_dir", evaluated.run.parent]
    result = failure(capsys, eval_script.main, *arguments)
    assert (result.code, len(result.lines)) == (2, 1)
    assert "resume: auto finds no checkpoint of this configuration" in result.said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "eval.py needs a checkpoint"),
        (["resume", "none.pth.tar"], "none.pth.tar: no such checkpoint file"),
        (["resume", "README.md"], "README.md: is damaged or no checkpoint"),
    ],
)
def test_bad_input_makes_no_folder(arguments, expected, tmp_path, capsys):
    result = failure(capsys, eval_script.main, "--cfg", ARB, *arguments, "save_dir", tmp_path / "saved")
    assert result.code == 2
    assert len(result.lines) == 1
    assert expected in result.said
    assert not (tmp_path / "saved").exists()
