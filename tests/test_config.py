"""Configuration files: what loads, what is refused with which words, and how the originals' switches are read."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.config import OBSOLETE, OLD_SWITCHES, OPTIONS, ConfigError, dump_config, load_config, read_config

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "config").rglob("*.yaml") if path.parent.name != "sweeps")
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# A stage-1 file of MiSLAS: every key that it has.
MISLAS = """
name: cifar10_imb001_stage1_mixup
dataset: 'cifar10'
data_path: './data/cifar10'
num_classes: 10
imb_factor: 0.01
backbone: 'resnet32_fe'
head_class_idx: [0, 3]
med_class_idx: [3, 7]
tail_class_idx: [7, 10]

mode: null
smooth_head: null
smooth_tail: null
shift_bn: False
lr_factor: null

num_epochs: 200
batch_size: 128
lr: 0.1
momentum: 0.9
weight_decay: 2e-4
cos: False
mixup: True
alpha: 1.0

print_freq: 40
workers: 16
log_dir: 'logs'
model_dir: 'ckps'
resume: ''
deterministic: True
gpu: null
world_size: -1
rank: -1
dist_url: 'tcp://localhost:23456'
dist_backend: 'nccl'
multiprocessing_distributed: False
distributed: False
"""

# What ARBLOSS adds to it.
ARBLOSS = """
arbloss: True
warbloss: False
arbloss_fl: False
arb_loss_use_global_class_cnt: True
LAS: False
not_pretrained: False
train_stage2_instance: False
"""


@pytest.fixture
def write(tmp_path):
    def write(content, name="run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        return path

    return write


def refusal(path, overrides=()):
    """The message of the ConfigError, which is one line."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# What loads


def test_there_are_configuration_files_to_test():
    assert len(FILES) >= 40


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT / "config")) for path in FILES])
def test_every_file_of_ours_loads_frozen_and_survives_being_dumped(path, write):
    cfg = load_config(path)
    assert set(cfg) == set(OPTIONS)
    assert cfg.name == path.stem
    with pytest.raises(AttributeError, match="immutable"):
        cfg.lr = 1.0
    assert cfg.lr != 1.0
    assert dict(load_config(write(dump_config(cfg), "other.yaml"))) == dict(cfg)


@pytest.mark.parametrize("key", OPTIONS)
def test_every_default_is_a_value_that_the_option_accepts(key):
    option = OPTIONS[key]
    assert option.parse(option.default) == option.default
    assert option.doc


def test_defaults_of_one_configuration_are_not_shared_with_the_next(write):
    path = write("seed: 1")
    load_config(path).lr_steps.append(7)
    assert load_config(path).lr_steps == [160, 180]


def test_an_option_that_is_not_given_has_its_default_and_the_name_is_the_file_s(write):
    cfg = load_config(write("lr: 0.3", "some.experiment.yaml"))
    expected = {key: option.default for key, option in OPTIONS.items()} | {"lr": 0.3, "name": "some.experiment"}
    assert dict(cfg) == expected


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("lr: 1", 1.0),
        ("weight_decay: 2e-4", 2e-4),
        ("weight_decay: '2e-4'", 2e-4),
        ("num_epochs: 2e2", 200),
        ("batch_size: '128'", 128),
        ("mixup: yes", True),
        ("imb_factor: None", None),
        ("lr_steps: (3, 5)", [3, 5]),
        ("lr_steps: [0.8, 0.9]", [0.8, 0.9]),
        ("logit_clamp: null", None),
        ("pretrained: weights/resnet152.pth", "weights/resnet152.pth"),
        ("pretrained: False", False),
        ("shots: count", "count"),
        ("resume: null", ""),
        ("name: '2e-4'", "2e-4"),
        ("data_path: '[1]'", "[1]"),
    ],
)
def test_values_are_read_as_they_are_meant(write, line, value):
    key = line.split(":")[0]
    cfg = load_config(write(line))
    assert cfg[key] == value
    assert type(cfg[key]) is type(value)


def test_unicode_and_a_byte_order_mark_are_read(write):
    assert load_config(write("\ufeffname: Übung")).name == "Übung"


# ---------------------------------------------------------------------------------------------------------------------
# Inheritance


def test_a_base_is_relative_to_its_file_and_the_nearer_file_wins(write, monkeypatch, tmp_path):
    write("lr: 0.3\nseed: 3\nbatch_size: 16\nname: root", "common/root.yaml")
    write("_BASE_: ../common/root.yaml\nseed: 4\nbatch_size: 32", "sets/base.yaml")
    path = write("_BASE_: ../sets/base.yaml\nbatch_size: 64", "runs/run.yaml")
    monkeypatch.chdir(tmp_path.parent)
    cfg = load_config(path)
    assert (cfg.lr, cfg.seed, cfg.batch_size, cfg.name) == (0.3, 4, 64, "root")
    assert load_config(path, ["batch_size", "8"]).batch_size == 8


def test_two_files_may_share_a_base_and_null_means_none(write):
    write("lr: 0.3", "base.yaml")
    assert [load_config(write("_BASE_: base.yaml", name)).lr for name in ("a.yaml", "b.yaml")] == [0.3, 0.3]
    assert load_config(write("_BASE_: null")).lr == 0.1


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ({"run.yaml": "_BASE_: run.yaml"}, ["loop", "run.yaml"]),
        ({"run.yaml": "_BASE_: a.yaml", "a.yaml": "_BASE_: ./b.yaml", "b.yaml": "_BASE_: a.yaml"}, ["loop", "b.yaml"]),
        ({"run.yaml": "_BASE_: nowhere.yaml"}, ["run.yaml", "nowhere.yaml", "no file"]),
        ({"run.yaml": "_BASE_: ."}, ["_BASE_", "no file"]),
        ({"run.yaml": "_BASE_: [a.yaml]"}, ["_BASE_", "one YAML file"]),
        ({"run.yaml": "_BASE_: a.yaml", "a.yaml": "lr: -1"}, ["a.yaml: lr: -1 must be a number > 0"]),
        ({"run.yaml": "_BASE_: a.yaml", "a.yaml": "lrr: 1"}, ["a.yaml: unknown key 'lrr'", "'lr'"]),
    ],
)
def test_bases_that_do_not_work_are_refused(write, files, fragments):
    for name, content in files.items():
        write(content, name)
    message = refusal(write(files["run.yaml"]))
    assert all(fragment in message for fragment in fragments), message


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "must hold a mapping"),
        ("- lr\n- 0.1", "must hold a mapping of options (key: value), not list"),
        ("lr: [0.1", "is not YAML"),
        ("lr: 0.1\n---\nlr: 0.2", "is not YAML"),
        ("lr: 0.1\nseed: 1\nlr: 0.2", "key 'lr' is given twice"),
        ("lr: 2001-99-99", "is not YAML"),
        ("lr: " + "[" * 1500, "is not YAML"),
        (b"\x80\x02}q\x00\xff\xfe" * 10, "is not YAML"),
        (b"lr: 0.1\x00", "is not YAML"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_refused(write, content, fragment):
    path = write(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert fragment in message


TAGGED = ["lr: !!bool maybe", "lr: !!int ''", "lr: !!float ''", "lr: !!timestamp now"]
LONG = ["lr: 1" + ":0" * 200 + ".0", "lr: 1" + "0" * 400, "_BASE_: " + "a" * 300]


@pytest.mark.parametrize("line", TAGGED + LONG, ids=lambda line: line[:20])
def test_values_on_which_the_parser_stumbles_are_refused(write, line):
    assert "run.yaml" in refusal(write(line))


@pytest.mark.parametrize("name", ["nowhere.yaml", "", "a" * 300], ids=["missing", "directory", "too long a name"])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    assert str(tmp_path) in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("weight_deacy", "weight_decay"), ("epochs", "num_epochs"), ("Mixup", "mixup")],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(write, key, nearest):
    fragment = f"unknown key '{key}'; the nearest known one is '{nearest}'"
    assert fragment in refusal(write(f"{key}: 1"))
    assert f"command line: {fragment}" in refusal(write("lr: 0.1"), [key, "1"])


@pytest.mark.parametrize("key", ["3", "null", "true", "''", "'_BASE'", "{a: 1}", "[a]"])
def test_a_key_that_is_no_option_s_name_is_refused(write, key):
    refusal(write(f"? {key}\n: 1"))


BAD_VALUES = {  # (value, what is said of it): options
    ("a/b", "folder's name"): "name",
    ("..", "folder's name"): "name",
    ('"a\\nb"', "folder's name"): "name",
    ("7", "must be text"): "name save_dir dataset backbone train_txt",
    ("[a, b]", "must be text"): "fork data_path class_counts val_txt test_txt class_map",
    ("True", "must be text"): "resume loss",
    ("-1", "whole number >= 0"): "diagnostics seed workers eval_last subset_seed val_per_class drw_epoch warmup_epochs",
    ("-2", "whole number >= 0"): "checkpoint_every_steps",
    ("0.5", "whole number >= 0"): "nc_every seed",
    ("True", "whole number >= 0"): "seed",
    ("null", "whole number >= 0"): "seed nc_start_epoch cmo_idle cutout",
    ("0", "whole number >= 1 and <= 16"): "num_ops",
    ("31", "whole number >= 0 and <= 30"): "magnitude",
    ("[-1, 3]", "whole number >= 0"): "diagnostics_rows tail_class_idx",
    ("[160, 180.5]", "whole number >= 0"): "lr_steps",
    ("0", "whole number >= 1"): "print_freq eval_every num_classes accumulate num_epochs batch_size",
    ("1.5", "whole number >= 1"): "num_epochs",
    ("7", "whole number >= 8"): "image_size",
    **{(value, "fractions alone"): "lr_steps" for value in ("[0.8, 20]", "[0, 0.5]", "[0.9, 0.8]", "[0.5, x]")},
    ("9", "list of values"): "diagnostics_rows keep_epochs lr_steps",
    ("null", "list of values"): "lr_step_factors",
    ("[180, 160]", "must increase"): "keep_epochs lr_steps",
    ("[0, 3, 7]", "must be [first, last + 1]"): "head_class_idx",
    ("[7, 3]", "must be [first, last + 1]"): "med_class_idx",
    ("7", "must be a list"): "tail_class_idx",
    ("1", "must be True or False"): "deterministic compile cuda_graph sync_bn nesterov arbloss",
    ("maybe", "must be True or False"): "deterministic decompose mixup cos cos_warmup not_pretrained",
    ("null", "must be True or False"): "LAS",
    ("maybe", "must be one of auto, True, False"): "data_on_device",
    ("1", "must be one of auto, True, False"): "data_on_device",
    ("True", "must be auto, False or the path of a folder"): "data_cache",
    ("null", "must be auto, False or the path of a folder"): "data_cache",
    ("gpu", "must be one of auto, cpu, cuda"): "device",
    ("[cpu]", "must be one of auto"): "device",
    ("16", "must be one of fp32, tf32, bf16, fp16"): "precision",
    ("frequency", "must be one of index, count"): "shots",
    ("reg", "must be one of proj, slerp"): "spa",
    ("cudo", "did you mean cuda?"): "device",
    ("expo", "did you mean exp?"): "imb_type",
    ("adam", "did you mean adamw?"): "optimizer",
    **{(value, "must be"): "betas" for value in ("0.9", "[0.9]", "[0.9, 1]", "[-0.1, 0.9]", "[0.9, 0.9, 0.9]")},
    ("cosin", "did you mean cosine?"): "classifier",
    ("concav", "did you mean concave?"): "smooth_shape",
    ("cutmx", "did you mean cutmix?"): "mix",
    ("autoaugmnt", "did you mean autoaugment?"): "augment",
    ("fats", "did you mean fast?"): "decoder",
    ("100", "must lie in (0, 1]: it is the smallest class over the largest, 0.01 for a ratio of 100"): "imb_factor",
    **{(value, "must lie in (0, 1]"): "imb_factor" for value in ("0", "-0.1", ".nan", "True", "small")},
    ("3", "True, False or the path"): "pretrained",
    ("''", "True, False or the path"): "pretrained",
    ("0", "must be a number > 0"): "lr cosine_scale logit_clamp nc_means_lr focal_alpha smooth_power max_grad_norm",
    **{(value, "must be a number > 0"): "lr" for value in (".inf", ".nan", "fast", "True", "null", "[0.1]")},
    ("[0.1, 0]", "must be a number > 0"): "lr_step_factors",
    ("-0.1", "must be a number >= 0"): "tau ldam_max_margin nc_within nc_rows focal_gamma alpha weight_decay",
    ("far", "must be a number >= 0"): "nc_between cmo_alpha nc_means nc_dual",
    ("null", "must be a number >= 0"): "post_hoc_tau",
    (
        "1.01",
        "must be a number >= 0 and <= 1",
    ): "drw_beta smooth_head momentum mix_prob random_erasing spa_gamma spa_step",
    ("1.5", "must be a number >= 0 and <= 1"): "label_smoothing ema",
    ("-1", "must be a number >= 0"): "sam",
    ("-0.1", "must be a number >= 0 and <= 1"): "smooth_tail",
}
BAD_ROWS = [(key, bad, fragment) for (bad, fragment), keys in BAD_VALUES.items() for key in keys.split()]


@pytest.mark.parametrize(("key", "bad", "fragment"), BAD_ROWS)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused(write, key, bad, fragment):
    path = write(f"{key}: {bad}")
    message = refusal(path)
    assert message.startswith(f"{path}: {key}: ")
    assert fragment in message


def test_every_option_has_a_row_among_the_bad_values():
    assert {key for key, _, _ in BAD_ROWS} >= set(OPTIONS)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("lr_steps: [5, 10, 15]", ["lr_steps", "lr_step_factors", "same length"]),
        ("loss: las\nsmooth_head: 0.3", ["las", "smooth_tail"]),
        ("LAS: True", ["las", "smooth_head"]),
        ("loss: ldam", ["loss: ldam needs classifier: cosine, not linear", "margins"]),
        ("loss: dot_regression", ["loss: dot_regression needs classifier: simplex, not linear"]),
        ("mixup: True\nmix: cmo", ["mix: cmo takes the place of mixup: True; set mixup: False"]),
        ("mix: cutmix\nalpha: null", ["mix needs alpha, such as 1.0"]),
        ("mix: cmo\nnum_epochs: 6", ["cmo_idle: 3 first and 3 last epochs leave none of 6 for CMO"]),
        ("nesterov: True\nmomentum: 0", ["nesterov: True needs momentum above 0, such as 0.9"]),
        (
            "label_smoothing: 0.1\nloss: focal_arb",
            ["label_smoothing is for loss: ce, arb, logit_adjustment, not focal"],
        ),
        ("sam: 0.05\naccumulate: 2", ["sam needs accumulate: 1, not 2"]),
        ("optimizer: adamw\nnc_within: 0.1", ["nc_within needs optimizer: sgd, not adamw"]),
        ("label_smoothing: 1", ["label_smoothing: 1 would train without labels"]),
        ("ema: 1", ["ema: 1 would keep the initial weights; use a decay below 1"]),
        ("label_smoothing: 0.1\nloss: arb", ["needs class_counts: global or batch_unmasked, not batch: a class"]),
        ("nc_between: 0.1", ["nc_between needs nc_within, such as 0.01"]),
        *(
            (
                f"{option}\nclassifier: simplex",
                [f"{option.split(':')[0]} needs classifier: linear or cosine, not simplex"],
            )
            for option in ("nc_rows: 1", "nc_dual: 1", "spa: proj")
        ),
        *(
            (f"{option}\naccumulate: 2", [f"{option.split(':')[0]} needs accumulate: 1, not 2"])
            for option in ("nc_means: 1", "nc_dual: 1", "spa: slerp")
        ),
        ("head_class_idx: [0, 3]", ["head_class_idx", "come together"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(write, content, fragments):
    message = refusal(write(content))
    assert all(fragment in message for fragment in fragments), message


def test_terms_that_need_no_whole_batch_or_no_rows_are_not_refused(write):
    load_config(write("nc_rows: 1\naccumulate: 2"))
    load_config(write("nc_means: 1\nclassifier: simplex"))


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"]
)
@pytest.mark.parametrize("key", ["lr", "name", "world_size", "_BASE_"])
def test_python_tags_are_refused_and_run_nothing(write, tmp_path, tag, key):
    made = tmp_path / "made"
    argument = f"mkdir {made}" if "system" in tag else str(made)
    refusal(write(f"{key}: {tag} ['{argument}']"))
    refusal(write("lr: 0.1"), ["lr", f"{tag} ['{argument}']"])
    assert not made.exists()
    yaml.unsafe_load(f"{tag} ['{argument}']")  # what the tag would have done
    assert made.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_overrides_win_and_are_read_like_yaml(write):
    pairs = "lr 1 weight_decay 5e-4 imb_factor null lr_steps [3,5] mixup true name 007 resume null.pth cos False"
    cfg = load_config(write("lr: 0.3\nimb_factor: 0.01"), pairs.split())
    assert (cfg.lr, cfg.weight_decay, cfg.imb_factor, cfg.lr_steps) == (1.0, 5e-4, None, [3, 5])
    assert (cfg.mixup, cfg.name, cfg.resume, cfg.cos) == (True, "007", "null.pth", False)
    assert type(cfg.lr) is float
    assert load_config(write("lr: 0.3"), ["lr", "0.1", "lr", "0.2"]).lr == 0.2


def test_an_override_without_a_value_is_refused(write):
    message = refusal(write("lr: 0.3"), ["lr", "0.1", "seed"])
    assert message.startswith("command line: ")
    assert "'seed' stands alone" in message


@pytest.mark.parametrize(
    "value",
    ["0", "[1", "\x00", "1\n2", "", "2001-99-99", "!!bool maybe", "[" * 1500, "1" + "0" * 5000],
    ids=lambda text: ascii(text)[:15],
)
def test_an_override_with_a_bad_value_is_refused_with_its_key(write, value):
    assert refusal(write("lr: 0.3"), ["lr", value]).startswith("command line: lr: ")


# ---------------------------------------------------------------------------------------------------------------------
# The originals' files


def test_a_file_of_mislas_loads_unchanged(write):
    cfg, notes = read_config(write(MISLAS))
    given = {key: value for key, value in yaml.safe_load(MISLAS).items() if key in OPTIONS}
    assert {key: cfg[key] for key in given} == given | {"weight_decay": 2e-4}
    assert (cfg.loss, cfg.class_counts, cfg.pretrained) == ("ce", "batch", None)
    assert (cfg.lr_steps, cfg.lr_step_factors, cfg.warmup_epochs) == ([160, 180], [0.1, 0.01], 5)
    assert dict(load_config(write(dump_config(cfg), "again.yaml"))) == dict(cfg)
    assert len(notes) == 4  # the launcher, stage 2, the folder's layout, the steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("arb", "global", None)),
        ({"arb_loss_use_global_class_cnt: True": "arb_loss_use_global_class_cnt: False"}, ("arb", "batch", None)),
        ({"warbloss: False": "warbloss: True"}, ("weighted_arb", "global", None)),
        ({"arbloss_fl: False": "arbloss_fl: True"}, ("focal_arb", "global", None)),
        ({"not_pretrained: False": "not_pretrained: True"}, ("arb", "global", False)),
        ({"arbloss: True": "arbloss: False"}, ("ce", "global", None)),
        (
            {"arbloss: True": "arbloss: False", "LAS: False": "LAS: True", "smooth_head: null": "smooth_head: 0.3"},
            ("las", "global", None),
        ),
    ],
)
def test_a_file_of_arbloss_loads_and_its_switches_are_translated(write, changes, expected):
    content = MISLAS.replace("smooth_tail: null", "smooth_tail: 0.0") + ARBLOSS
    for old, new in changes.items():
        assert old in content
        content = content.replace(f"\n{old}\n", f"\n{new}\n")
    cfg = load_config(write(content))
    assert (cfg.loss, cfg.class_counts, cfg.pretrained) == expected
    assert not set(cfg) & {*OLD_SWITCHES, *OBSOLETE}
    assert dict(load_config(write(dump_config(cfg), "again.yaml"))) == dict(cfg)


def test_obsolete_keys_are_named_once_with_the_reason(write):
    path = write("gpu: 0\nrank: [any, thing]\nmode: stage2\nlr_factor: 0.1\nmodel_dir: ckps\nlr_steps: [3, 5]")
    _, notes = read_config(path)
    assert notes == [
        f"{path}: ignored gpu, rank (the launcher decides)",
        f"{path}: ignored mode, lr_factor (stage 2 only)",
        f"{path}: ignored model_dir (a run's folder has one fixed layout)",
    ]


def test_obsolete_keys_on_the_command_line_are_named_too(write):
    _, notes = read_config(write("lr_steps: [3, 5]"), ["gpu", "0"])
    assert notes == ["command line: ignored gpu (the launcher decides)"]


@pytest.mark.parametrize(
    ("content", "overrides", "noted"),
    [
        ("lr: 0.1", [], True),
        ("lr_steps: [160, 180]", [], False),
        ("lr: 0.1", ["lr_steps", "[160, 240]"], False),
        ("cos: True", [], False),
        ("_BASE_: base.yaml", [], False),
    ],
)
def test_steps_that_nobody_set_are_noted(write, content, overrides, noted):
    write("lr_steps: [3, 5]", "base.yaml")
    _, notes = read_config(write(content), overrides)
    assert [("[160, 180]" in note and "[160, 240]" in note) for note in notes] == [True] * noted


def test_a_translated_switch_is_noted_where_it_changes_something(write):
    path = write("arbloss: True\narb_loss_use_global_class_cnt: False\nnot_pretrained: True\nlr_steps: [3, 5]")
    _, notes = read_config(path)
    assert notes == [
        f"{path}: arbloss: True is read as loss: arb",
        f"{path}: not_pretrained: True is read as pretrained: False",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("arbloss: True", "loss: ce"),
        ("arbloss: False", "loss: arb"),
        ("warbloss: True", "loss: arb"),
        ("arbloss_fl: True", "loss: arb"),
        ("LAS: True", "loss: ce"),
        ("arb_loss_use_global_class_cnt: True", "class_counts: batch"),
        ("not_pretrained: True", "pretrained: True"),
    ],
)
@pytest.mark.parametrize("base", ["", "arbloss: True", "warbloss: True", "loss: focal_arb"])
def test_an_old_and_a_new_switch_of_one_source_that_disagree_are_refused_with_both_names(write, base, old, new):
    write(f"smooth_head: 0.3\nsmooth_tail: 0.0\n{base}", "base.yaml")
    for content in (f"{old}\n{new}", f"{new}\n{old}"):
        message = refusal(write(f"_BASE_: base.yaml\n{content}"))
        assert old.split(":")[0] in message
        if "LAS" not in old:
            assert new.split(":")[0] in message
            assert "disagree" in message
    pairs = [word for pair in (old, new) for word in pair.split(": ")]
    assert refusal(write("_BASE_: base.yaml"), pairs).startswith("command line: ")


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("arbloss: True", "loss: arb", "loss", "arb"),
        ("arbloss: True\nwarbloss: True", "loss: weighted_arb", "loss", "weighted_arb"),
        ("arb_loss_use_global_class_cnt: True", "class_counts: global", "class_counts", "global"),
        ("not_pretrained: True", "pretrained: False", "pretrained", False),
    ],
)
def test_an_old_and_a_new_switch_that_agree_load(write, old, new, key, value):
    assert load_config(write(f"{old}\n{new}"))[key] == value


@pytest.mark.parametrize(
    ("first", "second", "key", "value"),
    [
        ("arbloss: True", "loss: ce", "loss", "ce"),
        ("loss: arb", "arbloss: False", "loss", "ce"),
        ("loss: ce", "arbloss: True", "loss", "arb"),
        ("LAS: True", "arbloss: True, LAS: False", "loss", "arb"),
        ("arbloss: True", "LAS: True, arbloss: False", "loss", "las"),
        ("arbloss: True, warbloss: True", "warbloss: False, arbloss: False", "loss", "ce"),
        ("arb_loss_use_global_class_cnt: True", "class_counts: batch", "class_counts", "batch"),
        ("class_counts: global_masked", "arb_loss_use_global_class_cnt: False", "class_counts", "batch"),
        ("pretrained: True", "not_pretrained: True", "pretrained", False),
        # A variant that is switched off later leaves what the other switches say.
        ("arbloss: True, arbloss_fl: True", "arbloss_fl: False", "loss", "arb"),
        ("warbloss: True", "LAS: True, warbloss: False", "loss", "las"),
        ("not_pretrained: True", "not_pretrained: False", "pretrained", None),
    ],
)
def test_between_sources_the_later_one_wins(write, first, second, key, value):
    first, second = first.replace(", ", "\n"), second.replace(", ", "\n")
    write(f"smooth_head: 0.3\nsmooth_tail: 0.0\n{first}", "base.yaml")
    assert load_config(write(f"_BASE_: base.yaml\n{second}"))[key] == value
    pairs = [word for line in second.splitlines() for word in line.split(": ")]
    assert load_config(write("_BASE_: base.yaml"), pairs)[key] == value


@pytest.mark.parametrize(
    ("base", "content", "overrides"),
    [
        ("", "LAS: True\narbloss: True", []),
        ("", "LAS: True", ["arbloss", "True"]),
        ("", "", ["LAS", "True", "arbloss", "True"]),
        ("arbloss: True", "LAS: True", []),
        ("LAS: True", "arbloss: True", []),
    ],
)
def test_las_together_with_arb_is_refused_with_the_reason(write, base, content, overrides):
    write(f"smooth_head: 0.3\nsmooth_tail: 0.0\n{base}", "base.yaml")
    message = refusal(write(f"_BASE_: base.yaml\n{content}"), overrides)
    assert all(fragment in message for fragment in ("LAS", "arb", "-inf"))


def test_two_variants_of_arb_are_refused_with_both_names(write):
    message = refusal(write("arbloss: True\nwarbloss: True\narbloss_fl: True"))
    assert "warbloss" in message and "arbloss_fl" in message


# ---------------------------------------------------------------------------------------------------------------------
# Properties


def test_dump_replaces_single_values(write):
    cfg = load_config(write("lr: 0.3"))
    again = load_config(write(dump_config(cfg, resume="x.pth", lr=0.5), "again.yaml"))
    assert dict(again) == dict(cfg) | {"resume": "x.pth", "lr": 0.5}


# To YAML 1.1 these are line ends and a byte order mark; the last one is a byte of a command line that is no UTF-8.
@pytest.mark.parametrize("sign", "\x85\u2028\u2029\ufeff\udce4", ids=ascii)
def test_odd_signs_of_the_command_line_survive_being_dumped(write, sign):
    cfg = load_config(write("lr: 0.1"), ["data_path", f"a{sign}b"])
    assert load_config(write(dump_config(cfg), "again.yaml")).data_path == f"a{sign}b"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "name": TEXT.filter(lambda name: not set(name) & set("/\\\0\n") and name not in (".", "..")),
        "resume": TEXT.filter(lambda path: not set(path) & set("$~")),
        "data_path": TEXT.filter(lambda path: not set(path) & set("$~")),
        "lr": POSITIVE,
        "weight_decay": st.floats(0, allow_infinity=False),
        "imb_factor": st.none() | st.floats(0, 1, exclude_min=True),
        "logit_clamp": st.none() | POSITIVE,
        "seed": st.integers(0, 2**63),
        "mixup": st.booleans(),
        "lr_steps": st.lists(st.integers(0, 10**6), min_size=2, max_size=2, unique=True).map(sorted),
        "lr_step_factors": st.lists(POSITIVE, min_size=2, max_size=2),
        "shots": st.sampled_from([None, "index", "count"]),
        "pretrained": st.sampled_from([None, True, False, "weights.pth"]),
    },
)


@PROPERTY
@given(values=VALUES)
def test_any_valid_values_survive_being_dumped(write, values):
    cfg = load_config(write(yaml.safe_dump(values)))
    assert {key: cfg[key] for key in values if key != "name"} == {k: v for k, v in values.items() if k != "name"}
    assert dict(load_config(write(dump_config(cfg), "again.yaml"))) == dict(cfg)


def config_or_refusal(path, overrides=()):
    """Any exception but ConfigError fails the test."""
    try:
        cfg = load_config(path, overrides)
    except ConfigError as error:
        assert str(error)
        return
    assert cfg.is_frozen()
    assert set(cfg) == set(OPTIONS)
    assert math.isfinite(cfg.lr)


def test_paths_are_expanded_wherever_they_are_given(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/runs")
    write("save_dir: $RUNS/a\ndata_path: ~/data\npretrained: ~/w.pth", "base.yaml")
    write("_BASE_: ~/base.yaml\ntrain_txt: ${RUNS}/t.txt", "x.yaml")
    cfg = load_config("$HOME/x.yaml", ["resume", "~/r.pth", "class_map", "~/map.txt", "fork", "a~b$"])
    assert (cfg.save_dir, cfg.data_path, cfg.train_txt) == ("/runs/a", f"{tmp_path}/data", "/runs/t.txt")
    assert (cfg.pretrained, cfg.resume) == (f"{tmp_path}/w.pth", f"{tmp_path}/r.pth")
    assert (cfg.class_map, cfg.fork) == (f"{tmp_path}/map.txt", "a~b$")
    assert f"data_path: {tmp_path}/data" in dump_config(cfg)


@pytest.mark.parametrize("key", ["save_dir", "data_path", "resume", "pretrained", "class_map"])
def test_a_variable_that_is_not_set_is_refused(write, key):
    path = write(f"{key}: $NOT_SET/runs")
    said = "'$NOT_SET/runs' must be a path without variables that are not set, such as $NOT_SET"
    assert refusal(path) == f"{path}: {key}: {said}"
    assert refusal("${NOT_SET}/x.yaml").startswith("--cfg: '${NOT_SET}/x.yaml' must be a path without")
    assert refusal(write("_BASE_: $NOT_SET.yaml")).startswith(f"{path}: _BASE_: '$NOT_SET.yaml' must be")


def test_steps_beside_a_cosine_schedule_are_noted(write):
    _, notes = read_config(write("cos: True"), ["lr_steps", "[0.8, 0.9]", "warmup_epochs", "2"])
    assert [note.split()[0] for note in notes] == ["lr_steps", "warmup_epochs"]
    assert "is not used: the cosine schedule" in notes[0]
    assert "without cos_warmup: True" in notes[1]
    assert read_config(write("cos: True\ncos_warmup: True\nwarmup_epochs: 2"))[1] == []
    assert read_config(write("cos_warmup: True\nlr_steps: [3, 5]"))[1] == [
        "cos_warmup is not used: cos: False always has a warm-up"
    ]


def test_options_of_the_other_optimizer_are_noted(write):
    _, notes = read_config(write("optimizer: adamw\nmomentum: 0\nnesterov: True\nlr_steps: [3, 5]"))
    assert notes == [f"{key} is not used: optimizer: adamw has betas" for key in ("momentum", "nesterov")]
    _, notes = read_config(write("betas: [0.9, 0.95]\nlr_steps: [3, 5]"))
    assert notes == ["betas is not used: optimizer: sgd has momentum"]


def test_options_of_what_is_off_are_noted_unless_they_are_the_defaults(write):
    common = "lr_steps: [3, 5]\n"
    _, notes = read_config(write(common + "num_ops: 3\nmagnitude: 9\nmix_prob: 0.7\ncmo_idle: 1\nspa_gamma: 0.5"))
    assert notes == [
        "num_ops is not used: it is for augment: randaugment",
        "mix_prob is not used: it is for mix: cutmix or cmo",
        "cmo_idle is not used: it is for mix: cmo",
        "spa_gamma is not used: it is for spa: proj",
    ]
    assert read_config(write(common + "augment: randaugment\nnum_ops: 3\nmix: cmo\nmix_prob: 1\ncmo_idle: 1"))[1] == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: is a folder; give the path of a YAML file, such as {tmp_path / 'config.yaml'}"
    )


KEYS = st.sampled_from([*OPTIONS, *OLD_SWITCHES, *OBSOLETE, "_BASE_", "lrr"])
TAGS = ["!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!set ", "!!python/name:os.system "]
SIGNS = ["&a ", "*a", "[", "]", "{", "}", "'", '"', ": ", "- ", "? ", "\n", "|", "=", "<<", "~"]
NUMBERS = ["1e400", "2001-99-99", "0x", "1:00:00", "True"]
FRAGMENTS = st.sampled_from([*TAGS, *SIGNS, *NUMBERS])
SNIPPET = st.lists(FRAGMENTS | st.text(max_size=5), max_size=4).map("".join)


@PROPERTY
@given(text=st.binary() | st.text() | st.lists(st.tuples(KEYS, SNIPPET).map(": ".join), max_size=4).map("\n".join))
def test_any_text_gives_a_frozen_configuration_or_a_refusal(write, text):
    config_or_refusal(write(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(max_size=5)


@PROPERTY
@given(values=st.dictionaries(KEYS | SCALARS, SCALARS | st.lists(SCALARS, max_size=3), max_size=4))
def test_any_mapping_gives_a_frozen_configuration_or_a_refusal(write, values):
    config_or_refusal(write(yaml.safe_dump(values)))


@PROPERTY
@given(pairs=st.lists(KEYS | SNIPPET, max_size=4))
def test_any_command_line_gives_a_frozen_configuration_or_a_refusal(write, pairs):
    config_or_refusal(write("lr: 0.1"), pairs)


def test_a_stage_2_file_of_mislas_loads_with_its_nulls(tmp_path):
    """Such a file says what its checkpoint is; there alpha is null beside mixup: False."""
    file = tmp_path / "stage2.yaml"
    file.write_text("mode: 'stage2'\nsmooth_head: 0.3\nsmooth_tail: 0.0\nlr_factor: 0.5\nmixup: False\nalpha: null\n")
    cfg = load_config(file)
    assert (cfg.mixup, cfg.alpha, cfg.smooth_head) == (False, None, 0.3)
    with pytest.raises(ConfigError, match="mixup: True needs alpha"):
        load_config(file, ["mixup", "True"])
