"""The bench: what it compares, how it counts, and every part in its smallest form. No speed is asserted."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.decoding import fast_decoder
from datasets.source import ImageFiles
from methods.losses import arb_loss, count_classes
from tests.conftest import ROOT, failure
from utils.bench import measure as bench
from utils.config import read_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def variables_are_put_back(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


@pytest.fixture
def run(capsys, tmp_path):
    """The bench in this process: (what was printed, the part of the JSON file)."""

    def run(part: str, *arguments: object) -> tuple[str, dict]:
        words = [part, "--json", tmp_path / "report.json", "--rounds", 2, "--device", "cpu", *arguments]
        bench.main([str(word) for word in words])
        report = json.loads((tmp_path / "report.json").read_text())
        assert list(report["parts"]) == [part]
        check_tables(report["parts"][part]["tables"])
        return capsys.readouterr().out, report["parts"][part]

    return run


def check_tables(tables: dict) -> None:
    """Medians, ratios and rounds agree."""
    for rows in tables.values():
        medians = {row["what"]: list(row.values())[1] for row in rows}
        for row in rows:
            assert row["low"] == min(row["rounds"]) and row["high"] == max(row["rounds"]) and row["low"] > 0
            assert medians[row["what"]] == pytest.approx(np.median(row["rounds"]))
            for key in row:
                if key.startswith("/ "):
                    assert row[key] == pytest.approx(medians[row["what"]] / medians[key[2:]])


def names(rows: list[dict]) -> list[str]:
    return [row["what"] for row in rows]


def context(tmp_path: Path, *arguments: str) -> bench.Bench:
    return bench.Bench(bench._arguments(["--device", "cpu", *arguments]), CPU, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_contestants_take_turns_in_an_order_of_each_round():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) or len(calls) for name in "abcde"}
    measured = bench.interleaved(contestants, 4)
    rounds = [calls[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(order) == list("abcde") for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    expected = list("abcde")
    random.Random(2).shuffle(expected)
    assert rounds[2] == expected
    assert list(measured) == list("abcde")
    assert measured["c"] == [5 * number + order.index("c") + 1 for number, order in enumerate(rounds)]


def test_rows_have_medians_and_ratios_of_medians():
    rows = bench.rows_of({"slow": [1.0, 3.0, 2.0], "fast": [4.0, 5.0, 9.0]}, "images/s", "slow")
    assert rows[1] == {
        "what": "fast",
        "images/s": 5.0,
        "low": 4.0,
        "high": 9.0,
        "/ slow": 2.5,
        "rounds": [4.0, 5.0, 9.0],
    }
    assert rows[0]["/ slow"] == 1


def test_the_first_round_of_a_comparison_does_not_count():
    calls = []
    rows = bench.compare({"a": lambda: calls.append(time.sleep(0.01))}, 5, CPU, 3, "a")
    assert len(calls) == 4 and len(rows[0]["rounds"]) == 3
    assert 0 < rows[0]["images/s"] <= 500


def test_the_clock_of_the_process_does_not_count_waiting():
    assert bench.seconds(lambda: time.sleep(0.2), CPU, time.process_time) < 0.2
    assert bench.seconds(lambda: time.sleep(0.2), CPU) >= 0.2


def test_a_table_is_aligned():
    rows = bench.rows_of({"classic": [512.4], "bf16+compile": [1.2345]}, "images/s", "classic")
    lines = bench.in_words("cifar", bench.Part({"batch": 128}, {"speed": rows})).splitlines()
    assert lines == [
        "",
        "== cifar",
        "batch: 128",
        "",
        "speed",
        "  what          images/s   low  high  / classic",
        "  classic            512   512   512          1",
        "  bf16+compile      1.23  1.23  1.23    0.00241",
    ]


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        first = torch.zeros(2**18)  # 1 MiB
        second = torch.zeros(2**19)
        del first
        return second, torch.zeros(2**18)

    run()
    assert bench.peak_memory(run, CPU) == 3 * 2**20
    assert bench.peak_memory(lambda: None, CPU) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@pytest.mark.parametrize("classes", [3, 100])
def test_the_published_formula_is_this_trainer_s_loss(classes):
    draw = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(16, classes, generator=draw)).double().requires_grad_()  # some beyond the clamp
    targets = torch.randint(classes, (16,), generator=draw)
    counts = count_classes(targets, classes)
    published = bench.published_arb(logits, targets, counts.double())
    (gradient,) = torch.autograd.grad(published, logits)
    ours = arb_loss(logits, targets, counts)
    torch.testing.assert_close(published, ours)
    torch.testing.assert_close(gradient, torch.autograd.grad(ours, logits)[0])


def test_the_classic_loop_sees_what_the_trainer_sees():
    data = bench.noise(256, 20)
    classic = bench.Classic(data, CPU)
    theirs = torch.stack([classic.train_loader.dataset[index][0] for index in range(256)])
    ours = torch.cat([batch.augment() for batch in data.train_loader(64, 0, CPU).epoch(0)])
    assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
    for statistic in (torch.mean, torch.std):  # black borders included
        torch.testing.assert_close(statistic(theirs, (0, 2, 3)), statistic(ours, (0, 2, 3)), atol=0.03, rtol=0.03)
    images, targets = next(iter(data.test_loader(CPU)))
    tested = [classic.test_loader.dataset[index] for index in range(20)]
    torch.testing.assert_close(torch.stack([image for image, _ in tested]), images)
    assert [label for _, label in tested] == targets.tolist()


def test_both_loops_train_the_same_network_as_the_configuration_says():
    cfg, _ = read_config(bench.CIFAR)
    assert cfg.batch_size == bench.BATCH
    data = bench.noise(bench.BATCH, 10)
    classic, trainer, bound = (make(data, *mode, CPU) for make, mode in
        ((bench.Classic, ()), (bench.Trainer, ("bf16",)), (bench.Bound, ("bf16",))))  # fmt: skip
    assert trainer.precision == bound.precision == "bf16"
    sizes = [sum(p.numel() for p in one.parameters()) for one in (classic.model, trainer.step.model, bound.model)]
    assert len(set(sizes)) == 1
    settings = [one.param_groups[0] for one in (classic.optimizer, trainer.step.optimizer)]
    assert all(settings[0][key] == settings[1][key] for key in ("lr", "momentum", "weight_decay"))


def test_a_bench_without_compilation_has_no_compiled_modes(tmp_path):
    assert context(tmp_path).modes() == ["fp32", "bf16", "fp32+compile", "bf16+compile"]
    assert context(tmp_path, "--no-compile").modes() == ["fp32", "bf16"]
    assert context(tmp_path, "--modes", "bf16+compile").modes() == ["bf16+compile"]
    assert bench.options_of("bf16+compile") == ["precision", "bf16", "compile", "True"]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def test_cifar(run):
    said, part = run("cifar", "--steps", 1, "--rounds", 1, "--modes", "fp32,bf16", "--no-compile")
    tried, rows = part["tables"].values()
    assert names(tried) == ["fp32", "bf16"] and all(row["first step, s"] > 0 for row in tried)
    fastest = max(tried, key=lambda row: row["high"])["what"]
    assert part["settings"]["fastest mode"] == fastest
    assert names(rows) == list(dict.fromkeys(["classic", "fp32", fastest, "bound"]))
    assert f"{fastest}, not compiled" in said and "/ classic  / bound" in said


def test_criterion(run, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE", 0.001)
    said, part = run("criterion")
    assert list(part["tables"]) == [f"{classes} classes" for classes in (10, 100, 1000, 8142)]
    for rows in part["tables"].values():
        assert names(rows) == ["plain, one target", "plain", "clamp, add, plain", "published", "ours"]
        assert rows[1]["peak / plain"] == rows[3]["peak / published"] == 1
    _, _, _, published, ours = part["tables"]["8142 classes"]
    assert ours["peak / published"] == ours["peak, MiB"] / published["peak, MiB"] < 0.6
    assert "ms" in said


def test_the_losses_are_one_loss_but_for_plain_cross_entropy(monkeypatch):
    """The criterion's contestants agree where they should."""
    values = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: values.append(loss.item()))
    for run in bench.losses(100, CPU).values():
        run()
    assert values[2:] == pytest.approx([values[2]] * 3, rel=1e-5)
    assert values[1] != pytest.approx(values[2], rel=1e-3)


def test_pipeline(run):
    said, part = run("pipeline")
    workers, device = part["tables"].values()
    assert names(workers) == ["classic", "pil", f"fast ({fast_decoder()})"]
    assert names(device) == ["colours, normalisation"]
    assert "photos: 32 made of two photographs" in said
    assert torch.get_num_threads() == bench.machine(CPU)["threads"]


def test_pipeline_on_photographs_of_one_s_own(run, tmp_path):
    photos = bench.make_photos(tmp_path / "own")
    for path in sorted(photos.iterdir())[2:]:
        path.unlink()
    threads = torch.get_num_threads()
    _, part = run("pipeline", "--photos", photos)
    assert part["settings"]["photos"] == f"2 of {photos}"
    assert torch.get_num_threads() == threads


def test_streamed_training(tmp_path):
    """On CUDA it is a part of pipeline."""
    photos = bench.make_photos(tmp_path / "photos")
    files = ImageFiles.under(photos, sorted(os.listdir(photos)))
    small = ["backbone", "resnet10", "image_size", "32", "batch_size", "4"]
    rows = bench.streamed(context(tmp_path, "--rounds", "1"), files, 2, *small)
    check_tables({"": rows})
    assert names(rows) == ["pil", "fast", "resident"]


def test_startup(run, tmp_path):
    data = bench.make_folders(tmp_path / "data", train=13, test=2)
    said, part = run("startup", "--data_path", data, "--modes", "fp32", "--rounds", "1")
    (rows,) = part["tables"].values()
    assert names(rows) == [*bench.STAGES, "all but torch"]
    assert rows[-1]["s"] == pytest.approx(sum(row["s"] for row in rows[1:-1]))
    assert part["settings"] == {"data": str(data)} and "first step" in said


def test_epoch(run, monkeypatch):
    commands = []

    def fake(bench_, data_path, epochs, *overrides, processes=1):
        commands.append((data_path.name, epochs, overrides, processes))
        time.sleep(0.1 * epochs)
        return [{"timing": {"train_seconds": seconds}} for seconds in (9.0, 1.0, 2.0, 3.0)[:epochs]]

    monkeypatch.setattr(bench, "train_by_command", fake)
    _, part = run("epoch", "--modes", "bf16", "--images", 2, "--rounds", 1)
    whole, growth = part["tables"].values()
    assert names(whole) == ["classic", "fp32", "bf16"]
    assert whole[1]["s"] >= 0.05
    assert names(growth) == ["20 images, batch 128", "twice the images", "batch 64", "batch 256", "2 processes"]
    assert growth[0]["s"] == 2.0
    assert ("epoch-1", 4, (), 2) in commands and ("epoch-2", 4, (), 1) in commands
    assert ("epoch-1", 1, ("precision", "bf16", "compile", "False"), 1) in commands
    assert part["settings"]["images"] == "20 for training, 20 for testing"


@pytest.mark.parametrize("processes", [1, 2])
def test_training_by_the_real_command(tmp_path, processes):
    data = bench.make_folders(tmp_path / "data", train=3, test=1)
    rows = bench.train_by_command(context(tmp_path), data, 1, "batch_size", "20", processes=processes)
    assert [row["epoch"] for row in rows] == [0] and rows[0]["timing"]["train_seconds"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The command


def in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_command_says_where_it_ran_and_writes_what_it_says(tmp_path):
    done = in_a_process("pipeline", "--rounds", 1, "--device", "cpu", "--json", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    for key, value in report.items():
        assert key == "parts" or f"{key}: {value}" in done.stdout.splitlines()
    assert report.keys() == {"date", "device", "cpu", "cores", "threads", "versions", "parts"}
    (row, *_), *_ = report["parts"]["pipeline"]["tables"].values()
    assert f"  classic  {row['images/s']:.0f}".split() == done.stdout[done.stdout.index("  classic") :].split()[:2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["cifar", "speed"], "'speed'"),
        (["--modes", "fp32,fast"], "'fast'"),
        (["--rounds", "0"], "'0'"),
        (["--steps", "many"], "'many'"),
        (["--photos", "nowhere"], "nowhere"),
        (["--photos", "config"], "config"),
        (["--json", "nowhere/report.json"], "nowhere"),
        (["--device", "tpu"], "'tpu'"),
        (["--frobnicate"], "--frobnicate"),
        (["startup", "--data_path", "config", "--device", "cpu"], "train"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_one_line(capsys, arguments, named):
    result = failure(capsys, bench.main, *arguments)
    assert result.code == 2 and len(result.lines) == 1 and result.lines[0].startswith("error: ")
    assert named in result.said


@pytest.mark.slow
def test_everything_with_compilation(tmp_path):
    done = in_a_process(
        *("cifar", "startup", "epoch", "--rounds", 1, "--steps", 2, "--images", 20, "--device", "cpu"),
        *("--modes", "fp32,bf16+compile", "--json", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert list(parts) == ["cifar", "startup", "epoch"]
    for part in parts.values():
        check_tables(part["tables"])
    assert "not compiled" not in parts["cifar"]["settings"]["bound"]
