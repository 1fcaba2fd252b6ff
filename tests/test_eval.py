"""Evaluation of checkpoints by the real script."""

import csv
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestCentroid

import eval as eval_script
from datasets import build_data
from models import build_model
from tests.conftest import ARB, ROOT, failure
from utils.checkpoint import load_weights

LINES = re.compile(
    r"\* Acc@1 (\d+\.\d{3})% Acc@5 (\d+\.\d{3})% HAcc (\d+\.\d{3})% MAcc (\d+\.\d{3})% TAcc (\d+\.\d{3})%\.\n"
    r"\* ECE   (\d+\.\d{3})%\.\n\Z"
)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to write reports into."""
    return shutil.copytree(finished, tmp_path / finished.name)


def evaluate(*arguments):
    eval_script.main(["--cfg", ARB, *map(str, arguments)])


def test_it_ends_with_the_training_logs_last_lines(run, capsys):
    evaluate("resume", run / "ckps" / "current.pth.tar")
    said = LINES.search(capsys.readouterr().out)
    log = next((run / "logs").iterdir()).read_text()
    assert said.group().splitlines() == [line.split(" ", 2)[2] for line in log.splitlines() if "* " in line][-2:]


def test_the_report_lies_in_the_runs_folder(run, capsys):
    evaluate("resume", run / "ckps" / "model_best.pth.tar")
    folder = run / "eval" / "model_best"
    pictures = {path.stem: Image.open(path) for path in folder.glob("*.png")}
    assert set(pictures) == {"class_accuracy", "confusion", "reliability", "similarity"}
    assert all(len(picture.convert("RGB").getcolors(10**6)) > 5 for picture in pictures.values())
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    said = capsys.readouterr().out
    assert float(LINES.search(said).group(1)) == pytest.approx(metrics["top1"], abs=5e-4)
    assert [row["name"] for row in rows] == [str(digit) for digit in range(10)]
    assert sum(float(row["top1_percent"]) for row in rows) / 10 == pytest.approx(metrics["macro"], abs=1e-3)
    assert [int(row["train_images"]) for row in rows][:3] == [138, 102, 73]
    assert {"top1", "top5", "many", "medium", "few", "macro", "worst_class", "nll", "ece", "mce", "shots"} <= set(
        metrics
    )
    assert set(metrics["shots"]) == {"index", "count"}
    assert "worst class" in said


def test_a_file_in_mislas_format_gives_the_same_report_in_a_folder_of_its_own(run, tmp_path, capsys):
    own = torch.load(run / "ckps" / "current.pth.tar", weights_only=True)
    foreign = {
        "epoch": 2,
        "state_dict_model": {f"module.{key}": value for key, value in own["state_dict_model"].items()},
        "state_dict_classifier": {f"module.{key}": value for key, value in own["state_dict_classifier"].items()},
        "best_acc1": own["best_acc1"],
    }
    torch.save(foreign, tmp_path / "mislas.pth.tar")
    evaluate("resume", run / "ckps" / "current.pth.tar")
    expected = LINES.search(capsys.readouterr().out).group()
    evaluate("resume", tmp_path / "mislas.pth.tar", "save_dir", tmp_path / "saved")
    assert LINES.search(capsys.readouterr().out).group() == expected
    (folder,) = (tmp_path / "saved").iterdir()
    assert folder.name.startswith("digits_imb005_arbloss_mixup_eval_")
    assert (folder / "metrics.json").is_file()


def test_shots_by_count_change_the_headline(run, capsys):
    evaluate("resume", run / "ckps" / "current.pth.tar", "shots", "count")
    said = capsys.readouterr().out
    metrics = json.loads((run / "eval" / "current" / "metrics.json").read_text())
    assert float(LINES.search(said).group(3)) == pytest.approx(metrics["shots"]["count"]["many"], abs=5e-4)
    assert "classes by count: many 2, medium 4, few 4" in said


def test_other_data_than_the_checkpoints_own_are_named(run, capsys):
    evaluate("resume", run / "ckps" / "current.pth.tar", "imb_factor", "0.5")
    assert "note: trained with imb_factor 0.05, but this configuration says 0.5" in capsys.readouterr().out


def test_calibration_per_group_is_reported_and_shown(run, capsys):
    evaluate("resume", run / "ckps" / "current.pth.tar")
    metrics = json.loads((run / "eval" / "current" / "metrics.json").read_text())
    errors = metrics["ece_groups"]
    assert list(errors) == ["index", "count"]
    assert all(set(by_name) == {"many", "medium", "few"} for by_name in errors.values())
    assert errors == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]["ece_groups"]
    said = capsys.readouterr().out
    assert f"\nECE by index: many {errors['index']['many']:.2f}, medium " in said
    assert not (run / "eval" / "current" / "decomposition.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Representation or classifier?


CUT = ["imb_factor", "0.5"]  # more training images than one batch has


@pytest.fixture(scope="module")
def decomposed(finished, tmp_path_factory):
    """What the script says and writes with ``decompose True``, its folder, and the same run's features."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("decomposed") / finished.name)
    command = [sys.executable, "eval.py", "--cfg", ARB, "resume", folder / "ckps" / "current.pth.tar"]
    done = subprocess.run(
        [*map(str, command), *CUT, "decompose", "True"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    report = folder / "eval" / "current"
    return SimpleNamespace(
        said=done.stdout,
        warned=done.stderr,
        folder=folder,
        metrics=json.loads((report / "metrics.json").read_text()),
        text=(report / "decomposition.json").read_text(),
        found=json.loads((report / "decomposition.json").read_text()),
    )


@pytest.fixture(scope="module")
def features(finished):
    """Features and targets of the training images and of the test images, and the logits of the latter."""
    data = build_data("digits", "", imb_factor=0.5)
    model = build_model("digits", "resnet20", data.num_classes).to(memory_format=torch.channels_last).eval()
    load_weights(model, finished / "ckps" / "current.pth.tar")
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
    assert "Warning" not in decomposed.warned


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


def test_two_processes_write_the_same_file(decomposed):
    """There are two batches of training images, one for each process, and one of test images."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "eval.py"]
    options = ["--cfg", ARB, "resume", decomposed.folder / "ckps" / "model_best.pth.tar", *CUT, "decompose", True]
    shutil.copy(decomposed.folder / "ckps" / "current.pth.tar", decomposed.folder / "ckps" / "model_best.pth.tar")
    done = subprocess.run([*map(str, command + options)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (decomposed.folder / "eval" / "model_best" / "decomposition.json").read_text() == decomposed.text
    assert done.stdout.count("nearest class mean") == 1
    assert LINES.search(done.stdout).group() == LINES.search(decomposed.said).group()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


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
