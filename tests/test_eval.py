"""Evaluation of checkpoints by the real script."""

import csv
import json
import re
import shutil

import pytest
import torch

import eval as eval_script
from tests.conftest import ARB, failure

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
