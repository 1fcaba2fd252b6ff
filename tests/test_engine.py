"""An arm of a sweep by the usual loop, on digits at 8 pixels, and what is published of both engines."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, failure
from tests.test_sweep_plan import ARMS, written
from tests.test_sweep_tables import FIELDS, check_engine
from utils.bench import engine
from utils.errors import InputError
from utils.schedule import lr_at
from utils.sweep import results as sweep
from utils.sweep.plan import Run, plan
from utils.sweep.spec import read_sweep

MIXED = {"arb": ARMS["arb"] | {"mixup": True}}
OPTIONS = {"num_epochs": 3, "batch_size": 64, "lr_steps": [0.5, 0.9], "warmup_epochs": 1, "backbone": "resnet8"}
WORKERS = ["workers", "0"]  # crops and flips depend on their number


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What a repository needs for publishing, with seeds 0 and 1 of its sweep trained by the usual loop."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "config/digits", root / "config/digits")
    folder = root / sweep.SWEEPS
    options = OPTIONS | {"image_size": 8}
    written(folder, cfg="../digits/digits_imb005.yaml", options=options, arms=ARMS | MIXED, seeds=[0, 1, 2])
    places = ("tiny", "engine_tiny")
    page = "".join(f"<!-- results of {name} -->\n<!-- end of results -->\n" for name in places)
    (root / sweep.PAGE).write_text(page)
    assert call(root, "--seeds", "0,1") == 0
    return root


def call(root: Path, *more: str, arm: str = "arb") -> int:
    where = [str(root / sweep.SWEEPS / "tiny.yaml"), "--save_dir", str(root / "saved")]
    return engine.main([*where, "--arm", arm, *more, *WORKERS])


def runs_of(root: Path) -> list[Run]:
    asked = read_sweep(root / sweep.SWEEPS / "tiny.yaml")
    return [run for run in plan(asked, root, WORKERS) if run.arm == "arb"]


def rows_of(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "saved/tiny_engine/rows.jsonl").read_text().splitlines()]


def test_a_row_is_one_of_a_sweep_s_results(trained):
    rows = rows_of(trained)
    assert [row["run"] for row in rows] == ["classic_seed0", "classic_seed1"]
    for row, run in zip(rows, runs_of(trained), strict=False):
        assert row.keys() >= FIELDS - {"cross_fitted", "best"}
        assert row["hash"] == run.hash and row["options"]["mixup"] and row["epochs"] == 3
        assert row["last"].keys() == {"top1", "many", "medium", "few"}
        assert 10 * row["last"]["top1"] == pytest.approx(
            sum(row["last"][group] * classes for group, classes in (("many", 3), ("medium", 4), ("few", 3)))
        )  # as many test images of every class
        assert row["data"] == rows[0]["data"] and row["threads"] == torch.get_num_threads()
    assert rows[0]["last"] != rows[1]["last"]


def test_what_is_done_is_not_trained_again(trained, monkeypatch):
    before = rows_of(trained)
    monkeypatch.setattr(engine, "train", lambda run, device: {"run": engine.name_of(run), "hash": run.hash})
    path = trained / "saved/tiny_engine/rows.jsonl"
    kept = path.read_text()
    assert call(trained) == 0
    assert rows_of(trained) == [*before, {"run": "classic_seed2", "hash": runs_of(trained)[2].hash}]
    path.write_text(kept)


def test_every_epoch_has_its_learning_rate_and_a_seed_repeats(trained, monkeypatch):
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    run = runs_of(trained)[0]
    again = engine.train(run, torch.device("cpu"))
    assert list(dict.fromkeys(rates)) == [lr_at(epoch, 0.1, 3, False, [0.5, 0.9], [0.1, 0.01], 1) for epoch in (0, 2)]
    assert again["last"]["top1"] == pytest.approx(rows_of(trained)[0]["last"]["top1"])


def test_both_engines_rows_are_published_as_a_sweep_of_two_arms(trained):
    with pytest.raises(InputError, match="tiny: nothing of it is published to compare with"):
        call(trained, "--publish")
    top1 = [row["last"]["top1"] for row in rows_of(trained)]
    theirs = [dict(row, arm="arb", run=f"arb_seed{row['seed']}") for row in rows_of(trained)]
    for row, difference in zip(theirs, (0.01, 0.02), strict=True):
        row["last"] = row["last"] | {"top1": row["last"]["top1"] - difference}
    others = [dict(row, arm="plain", hash="0") for row in theirs]
    asked = read_sweep(trained / sweep.SWEEPS / "tiny.yaml")
    results = sweep.results_of(asked, plan(asked, trained), images="digits")
    sweep.write_published({**results, "runs": [*others, *theirs]}, trained)
    assert engine.publish("tiny", runs_of(trained), rows_of(trained), trained) == 0
    found = sweep.published("engine_tiny", trained)
    assert [row["arm"] for row in found["runs"]] == ["arb", "arb", "classic", "classic"]
    page = (trained / sweep.PAGE).read_text()
    assert page == sweep.filled_page(trained) and "![engine_tiny_runs](results/engine_tiny_runs.png)" in page
    assert f"| classic | 2 | {sum(top1) / 2:.2f}" in page and "| classic - arb | 2 | +0.0" in page
    assert "* engines are equivalent: yes (+0.01" in page and "only 2 of 3 pairs so far" in page
    path = trained / sweep.PUBLISHED / "engine_tiny.json"
    check_engine(path, trained)
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(AssertionError):
        check_engine(path, trained)
    (trained / sweep.PAGE).write_text(page.replace("of engine_tiny", "of tiny"))
    with pytest.raises(InputError, match="has no place for the tables; put the lines <!-- results of engine_tiny"):
        engine.publish("tiny", runs_of(trained), rows_of(trained), trained)
    with pytest.raises(InputError, match="there is nothing to publish"):
        engine.publish("tiny", runs_of(trained)[2:], rows_of(trained), trained)


@pytest.mark.parametrize(
    ("arm", "more", "said"),
    [
        ("plain", [], "plain: the usual loop has ARB-Loss with batch counts and mixup alone, and loss is 'ce' here"),
        ("arb", ["classifier", "cosine"], "mixup alone, and classifier is 'cosine' here"),
        ("none", [], "tiny has no run of --arm none"),
        ("arb", ["--seeds", "7"], "tiny has no run of --arm arb with these --seeds"),
        ("arb", ["--seeds", "x"], "usage: python -m utils.bench.engine SWEEP.yaml --arm ARM"),
    ],
)
def test_what_the_usual_loop_cannot_train_is_refused_in_one_line(trained, capsys, arm, more, said):
    where = [trained / sweep.SWEEPS / "tiny.yaml", "--save_dir", trained / "nowhere", "--arm", arm]
    result = failure(capsys, engine.main, *where, *more)
    assert (result.code, len(result.lines)) == (2, 1) and said in result.said
    assert not (trained / "nowhere").exists()
