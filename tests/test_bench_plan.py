"""The bench's plan: its arithmetic on numbers made by hand, and one measurement of the smallest network."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ARB, ROOT, SHORT, failure
from utils.bench import __main__ as command
from utils.bench import plan
from utils.bench.plan import Cluster
from utils.config import load_config, parse_option

CPU = torch.device("cpu")
IMAGENET = str(ROOT / "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml")
CIFAR = str(ROOT / "config/cifar10/cifar10_imb001_arbloss_mixup.yaml")
SMALL = [*SHORT, "num_epochs", "10", "device", "cpu"]


def planned(*words: str, cfg: str = ARB) -> dict:
    """The JSON of :func:`plan.plan` on the digits or, with other data, stand-ins."""
    args = plan.parse(["--cfg", cfg, *SMALL, "data_path", "nowhere", *words])
    cfg = load_config(args.cfg, args.overrides)
    return plan.plan(cfg, plan.find_data(cfg, CPU, Path())[0], "", args, CPU)._asdict()


def by_name(rows: list[dict], key: str) -> dict:
    return {row["what"]: row[key] for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_the_parts_of_a_step():
    costs = {"step": 0.01, "decoder": 0.005, "evaluation": 0.003}
    cluster = Cluster(gpus=4, nodes=2, readers=10, bandwidth=10)
    assert cluster.seconds("step", 1024, costs, 10**8) == pytest.approx(
        {"decoder": 512 / 10 * 0.005, "step": 128 * 0.01, "network": 2 * 7 / 8 * 8e8 / 1e10}
    )
    assert cluster.seconds("evaluation", 100, costs) == pytest.approx(
        {"decoder": 0.025, "evaluation": 13 * 0.003, "network": 0}
    )


def test_one_process_sends_nothing_and_held_images_are_not_read():
    parts = Cluster(1, 1, 4, 10).seconds("step", 64, {"step": 0.01}, 10**8)
    assert parts == pytest.approx({"decoder": 0, "step": 0.64, "network": 0})


@pytest.fixture
def rates(monkeypatch):
    """What :func:`plan.measure` finds; its arguments are appended to the list."""
    asked = []

    def measure(cfg, data, device, own, limit, speed):
        asked.append((cfg, own, limit))
        found = {"evaluation": [400.0], "step": [50.0, 100.0, 1000.0], "decoder": [200.0]}
        return {what: found[what] for what in (["decoder"] if speed else found)}, own, 10**6

    monkeypatch.setattr(plan, "measure", measure)
    return asked


def test_hours_add_up_on_a_cpu(rates):
    """477 digits in steps of 64: 8 per epoch; 400 test images."""
    tables = planned("--gpus", "2", "--cores", "8", "--bandwidth", "1", "workers", "2", "eval_every", "4")["tables"]
    step = {"decoder": 64 / 2 / 200, "step": 32 / 100, "network": 8e6 / 1e9}  # medians
    assert by_name(tables["one training step, computed"], "ms") == pytest.approx({k: 1e3 * v for k, v in step.items()})
    training, evaluation = 10 * 8 * sum(step.values()) / 3600, 3 * (400 / 2 / 200 + 200 / 400) / 3600
    assert by_name(tables["hours, computed"], "hours") == pytest.approx(
        {"training": training, "evaluation": evaluation, "in all": training + evaluation}
    )
    limits = by_name(tables["hours, computed"], "limited by")
    assert limits == {"training": "step", "evaluation": "decoder", "in all": "step"}


def test_the_slowest_part_sets_the_pace_of_gpus(rates):
    part = planned("--speed", "800", "--cores", "1", "--nodes", "2", "eval_every", "10")
    tables = part["tables"]
    assert by_name(tables["one training step, computed"], "ms") == pytest.approx(
        {"decoder": 160, "step": 40, "network": 0.8}
    )
    hours = by_name(tables["hours, computed"], "hours")
    assert hours["training"] == pytest.approx(80 * 0.160 / 3600)
    assert hours["evaluation"] == pytest.approx(200 / 200 / 3600)
    assert "800 images/s per GPU, 10 Gbit/s" in part["settings"]["assumed"]


def test_without_workers_a_process_reads_and_computes_by_turns(rates):
    hours = planned("--speed", "800", "workers", "0", "eval_every", "10")["tables"]["hours, computed"]
    assert hours[0]["hours"] == pytest.approx(80 * (64 / 200 + 64 / 800) / 3600)


@pytest.mark.parametrize(
    ("words", "images", "graph"), [([], 64, True), (["--gpus", "3", "accumulate", "2"], 11, False)]
)
def test_what_is_measured_is_one_pass_of_one_process(rates, words, images, graph):
    planned(*words)
    ((cfg, own, limit),) = rates
    assert (cfg.accumulate, cfg.cuda_graph, own, limit) == (1, graph, images, 60)


def test_averaged_weights_are_tested_and_sam_averages_two_gradients(rates):
    part = planned("--gpus", "2", "ema", "0.9", "sam", "0.05", "val_per_class", "1")
    assert part["settings"]["images"].startswith("473 for training, 810 for 10 evaluations")
    network = by_name(part["tables"]["one training step, computed"], "ms")["network"]
    assert network == pytest.approx(1000 * 2 * 8e6 / 100e9)


def test_cmo_reads_twice_as_many_images(rates):
    def decoder(*words):
        table = planned("data_on_device", "False", *words)["tables"]["one training step, computed"]
        return by_name(table, "ms")["decoder"]

    assert decoder("mixup", "False", "mix", "cmo") == pytest.approx(2 * decoder())


def test_remedies_are_options():
    digits, lists = load_config(ARB), load_config(IMAGENET, ["workers", "4"])
    assert plan.remedies("decoder", lists, 8) == "decoder fast, workers 8"
    assert plan.remedies("decoder", digits, 4) == "data_on_device True, cores"
    assert plan.remedies("step", load_config(ARB, ["precision", "bf16", "compile", "True"]), 4) == "gpus"
    for part in ("decoder", "step"):
        for cfg in (digits, lists):
            for option in plan.remedies(part, cfg, 8).split(", "):
                key, _, value = option.partition(" ")
                assert parse_option(key, yaml.safe_load(value)) != cfg[key] if value else key in plan.USAGE


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_smallest_network_is_measured(capsys, tmp_path):
    """Its images read from memory by a worker, too."""
    words = ["plan", "--cfg", ARB, *SMALL, "data_on_device", "False", "--minutes", "0.001", "--gpus", "4"]
    assert command.main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    report, said = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    measured, step, hours = report["parts"]["plan"]["tables"].values()
    assert [row["what"] for row in measured] == ["evaluation", "step", "decoder"]
    assert all(0 < row["low"] <= row["images/s"] <= row["high"] for row in measured)
    rate = by_name(measured, "images/s")
    assert by_name(step, "ms")["step"] == pytest.approx(16 / rate["step"] * 1000)
    assert f"device: {report['device']}" in said and "\n== plan\n" in said and "1 x 4 processes, 16 images" in said
    assert [row["what"] for row in hours] == ["training", "evaluation", "in all"]


def test_stand_ins_are_as_many_as_published(capsys):
    """ImageNet-LT on photographs, of which the decoder alone is measured."""
    words = ["--speed", "100", "--minutes", "0.001", "data_path", "nowhere", "backbone", "resnet10", "image_size", "32"]
    assert command.main(["plan", "--cfg", IMAGENET, *words, "device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "115846 for training, 50000 for 200 evaluations; photographs of 500 x 375 pixels, since there is no" in said
    assert "decoder" in said.partition("measured, 8 images")[2].partition("computed")[0]


def test_a_cut_is_computed_without_its_images(rates):
    images = planned(cfg=CIFAR)["settings"]["images"]
    assert images.startswith("12406 for training, 10000 for 10 evaluations")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpus", "0"], "'0'"),
        (["--nodes", "many"], "'many'"),
        (["--frobnicate", "1"], "--frobnicate"),
        (["--json", "nowhere/plan.json"], "nowhere"),
        (["backbone", "resnet9"], "resnet9"),
        (["--gpus", "99"], "batch_size: 64"),
        (["batch_size"], "'batch_size' stands alone"),
        (["dataset", "imagenet", "data_path", "nowhere", "imb_factor", "0.1", "num_classes", "null"], "imb_factor"),
        (["dataset", "lists", "data_path", "nowhere", "num_classes", "null"], "nowhere"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_one_line(capsys, words, named):
    result = failure(capsys, command.main, "plan", "--cfg", ARB, *SMALL, *words)
    assert result.code == 2 and len(result.lines) == 1 and named in result.said


def test_a_configuration_is_needed(capsys):
    result = failure(capsys, command.main, "plan", "--gpus", "2")
    assert result.code == 2 and len(result.lines) == 1 and "--cfg" in result.said
