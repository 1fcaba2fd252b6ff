"""Checkpoints: exact round trips, the originals' files, and files that are damaged, unsafe or of something else."""

import io
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import build_method
from models import build_model
from models.classifier import LinearClassifier
from models.model import Model
from utils.checkpoint import (
    CheckpointError,
    TrainState,
    is_ours,
    load_weights,
    read_checkpoint,
    restore,
    save_checkpoint,
    stored_class_map,
)
from utils.meter import SUMS
from utils.precision import new_scaler
from utils.run.provenance import environment
from utils.run.resume import newest_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's word on files that are refused

SETTINGS = {"lr": 0.1, "lr_steps": [160, 180], "name": "Übung", "imb_factor": None, "mixup": True}
STATE = TrainState(epoch=7, best_acc1=65.13, its_ece=3.21)
MISLAS_KEYS = {"epoch", "state_dict_model", "state_dict_classifier", "best_acc1", "its_ece"}


def cifar_model(seed=0, backbone="resnet20", num_classes=10):
    torch.manual_seed(seed)
    return build_model("cifar10", backbone, num_classes)


def arb_method(counts=range(10, 0, -1)):
    options = {"smooth_head": None, "smooth_tail": None, "smooth_shape": "concave", "smooth_power": None}
    focal = {"focal_alpha": 1.0, "focal_gamma": 2.0}
    return build_method("arb", "global", torch.tensor(counts), mixup_alpha=0.0, clamp=30.0, **focal, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


def no_scaler():
    return new_scaler("fp32", torch.device("cpu"))


def train_step(model, optimizer, seed):
    """One step on random images: weights, batch-norm statistics and momentum move."""
    draw = torch.Generator().manual_seed(seed)
    images, targets = torch.randn(4, 3, 16, 16, generator=draw), torch.randint(10, (4,), generator=draw)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(images), targets).backward()
    optimizer.step()


def small_model(seed=0, block=False, num_classes=3):
    torch.manual_seed(seed)
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5)), LinearClassifier(5, num_classes))
    model.block = nn.Linear(5, 5) if block else None
    return model


def save_small(path, model, config=SETTINGS):
    save_checkpoint(path, model, arb_method(), sgd(model), no_scaler(), STATE, config, "test set")


def states_equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def refusal(read, path):
    """The message of the CheckpointError, which is one line that names the file."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


@pytest.fixture(scope="module")
def trained():
    """A model after two steps, and its optimizer."""
    model = cifar_model()
    optimizer = sgd(model)
    for seed in range(2):
        train_step(model, optimizer, seed)
    return model, optimizer


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckps") / "current.pth.tar"
    save_checkpoint(path, trained[0], arb_method(), trained[1], no_scaler(), STATE, SETTINGS, "test set")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Our own


def test_a_file_of_ours_has_mislas_keys_and_holds_no_code(saved):
    content = torch.load(saved, weights_only=True)
    assert set(content) >= MISLAS_KEYS
    assert "state_dict_block" not in content
    assert content["epoch"] == 7
    assert content["best_acc1"].shape == (1,)
    assert (content["its_ece"], content["config"], content["selected_on"]) == (3.21, SETTINGS, "test set")
    assert type(content["its_ece"]) is float
    assert is_ours(content)


def test_a_restored_run_is_the_saved_one_to_the_bit(trained, saved):
    model, optimizer = trained
    other, method = cifar_model(seed=1), arb_method(range(1, 11))
    fresh = sgd(other)
    state = restore(read_checkpoint(saved), saved, other, method, fresh, no_scaler())
    assert states_equal(other.state_dict(), model.state_dict())
    assert states_equal(method.state_dict(), arb_method().state_dict())
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    buffers, expected = (o.state_dict()["state"] for o in (fresh, optimizer))
    assert len(buffers) == len(list(model.parameters()))
    assert all(torch.equal(buffers[i]["momentum_buffer"], expected[i]["momentum_buffer"]) for i in expected)
    assert (state.epoch, state.its_ece) == (7, 3.21)
    assert state.best_acc1 == 65.13  # exactly, or a tie would become a new best


def test_weights_of_ours_load_with_epoch_and_accuracy(trained, saved):
    model = cifar_model(seed=1)
    loaded = load_weights(model, str(saved))
    assert states_equal(model.state_dict(), trained[0].state_dict())
    expected = {"epoch": 7, "best_acc1": pytest.approx(65.13), "class_map": None}
    assert loaded == expected | {"source": "this trainer's checkpoint"}


def test_a_block_travels_and_needs_a_place(tmp_path):
    path = tmp_path / "places"
    model, other = small_model(block=True), small_model(seed=1, block=True)
    save_small(path, model)
    load_weights(other, path)
    assert states_equal(other.state_dict(), model.state_dict())
    assert "state_dict_block" in read_checkpoint(path)
    assert "state_dict_block" in refusal(lambda p: load_weights(small_model(), p), path)
    save_small(path, small_model())
    assert "state_dict_block" in refusal(lambda p: load_weights(small_model(block=True), p), path)


def test_a_run_of_another_optimizer_or_method_is_refused(saved):
    content, model = read_checkpoint(saved), cifar_model()
    frozen = torch.optim.SGD(list(model.parameters())[1:], lr=0.1)
    assert "does not fit" in refusal(lambda p: restore(content, p, model, arb_method(), frozen, no_scaler()), saved)
    other = torch.nn.Linear(2, 2)
    assert "does not fit" in refusal(lambda p: restore(content, p, model, other, sgd(model), no_scaler()), saved)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_a_checkpoint_replaces_the_one_before_it(tmp_path):
    path = tmp_path / "current.pth.tar"
    for seed in range(2):
        save_small(path, small_model(seed))
    again = small_model(seed=2)
    load_weights(again, path)
    assert states_equal(again.state_dict(), small_model(seed=1).state_dict())
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    save_small(tmp_path / "there", small_model())
    before = (tmp_path / "there").read_bytes()
    for name in ("there", "new"):
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            save_small(tmp_path / name, small_model(seed=1), config={"hook": lambda: None})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"there": before}


def test_a_checkpoint_within_an_epoch_restores_its_place(tmp_path):
    model = small_model()
    sums = torch.arange(12, dtype=torch.float64).reshape(2, 6) / 7
    state = TrainState(3, 5, sums, 12.5, 678, 50.0, 1.0)
    path = tmp_path / "current.pth.tar"
    save_checkpoint(path, model, arb_method(), sgd(model), no_scaler(), state, SETTINGS, "test set")
    restored = restore(read_checkpoint(path), path, model, arb_method(), sgd(model), no_scaler())
    assert torch.equal(restored.sums, sums)
    assert replace(restored, sums=None) == replace(state, sums=None)


def restored_with(tmp_path, change):
    path = tmp_path / "x.pth.tar"
    save_small(path, small_model())
    model, content = small_model(), read_checkpoint(path)
    change(content)
    optimizer = sgd(model)
    return restore(content, path, model, arb_method(), optimizer, no_scaler()), optimizer, model


MISFITS = [torch.zeros(3), torch.zeros(5, 4, dtype=torch.complex64), torch.zeros(5, 4).long()]


@pytest.mark.parametrize("buffer", [*MISFITS, torch.zeros(5, 4).to_sparse(), [0.0]])
def test_a_momentum_that_does_not_fit_its_weight_is_refused(tmp_path, buffer):
    """A fused optimizer goes through raw memory and would not notice."""
    with pytest.raises(CheckpointError, match="does not fit this configuration: a momentum"):
        restored_with(tmp_path, lambda c: c["optimizer"].update(state={0: {"momentum_buffer": buffer}}))
    with pytest.raises(CheckpointError, match="state has exp_avg, and SGD's only"):
        restored_with(tmp_path, lambda c: c["optimizer"].update(state={0: {"exp_avg": buffer}}))


def test_a_momentum_gets_its_weight_s_memory(tmp_path):
    """One number under all places, say."""
    one = torch.full((1, 1), 7.0).expand(5, 4)
    _, optimizer, model = restored_with(
        tmp_path, lambda c: c["optimizer"].update(state={0: {"momentum_buffer": one}, 1: {"momentum_buffer": None}})
    )
    weight, bias, *_ = model.parameters()
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert momentum.stride() == weight.stride()
    assert (momentum == 7).all()
    assert optimizer.state[bias] == {}


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": math.inf},
        {"log_size": "x"},
        {"seconds": math.nan},
        {"best_acc1": math.nan},
        {"step": 1, "sums": torch.zeros(0, len(SUMS), dtype=torch.float64)},
        {"step": 1, "sums": torch.zeros(1, len(SUMS), dtype=torch.complex64)},
    ],
)
def test_a_place_that_cannot_be_is_refused(tmp_path, change):
    with pytest.raises(CheckpointError):
        restored_with(tmp_path, lambda content: content.update(change))


@pytest.mark.parametrize("sums", [None, 3, torch.zeros(2, 5), torch.zeros(6)])
def test_a_place_within_an_epoch_without_its_sums_is_refused(tmp_path, sums):
    with pytest.raises(CheckpointError, match="at step 5, and has no sums"):
        restored_with(tmp_path, lambda content: content.update(step=5, sums=sums))


# ---------------------------------------------------------------------------------------------------------------------
# The newest run (resume auto)


def run_of(root, name, config, age, best=True):
    """A run's folder whose checkpoints are ``age`` seconds old."""
    (root / name / "ckps").mkdir(parents=True)
    for number, kind in enumerate(("current", "model_best")[: 1 + best]):
        path = root / name / "ckps" / f"{kind}.pth.tar"
        save_small(path, small_model(), config)
        os.utime(path, (1e9 - age - number, 1e9 - age - number))
    return root / name / "ckps" / "current.pth.tar"


def test_the_newest_run_of_the_same_configuration_is_found(tmp_path):
    config = {"name": "a[b]", "lr": 0.1, "workers": 4}
    assert newest_checkpoint(str(tmp_path / "nowhere"), config).path == ""
    run_of(tmp_path, "a[b]_20260101000000", config, age=9)
    wanted = run_of(tmp_path, "a[b]_20250101000000_2", config | {"workers": 1}, age=5)
    for name in ("a[b]_other_20260101000000", "a[b]", "ab_20260101000000", "x_20260101000000", "a[b]_2026"):
        run_of(tmp_path, name, config, age=0)
    (tmp_path / "a[b]_20270101000000").mkdir()
    found = newest_checkpoint(str(tmp_path), config)
    assert (found.path, found.notes) == (str(wanted), [])
    assert found.content["epoch"] == 7


def test_a_run_of_another_configuration_is_passed_over_and_named(tmp_path):
    other = run_of(tmp_path, "a_20260101000000", {"name": "a", "lr": 0.2, "seed": 1}, age=0)
    found = newest_checkpoint(str(tmp_path), {"name": "a", "lr": 0.1, "seed": 2})
    assert found.content is None
    assert found.notes[0] == f"resume auto: passed over {other}, which has another lr, seed"
    assert "starting a new run" in found.notes[1]
    wanted = run_of(tmp_path, "a_20260101000000_2", {"name": "a", "lr": 0.1, "seed": 2}, age=9)
    assert newest_checkpoint(str(tmp_path), {"name": "a", "lr": 0.1, "seed": 2}).path == str(wanted)


def test_an_option_that_a_checkpoint_lacks_had_its_default_s_effect(tmp_path):
    path = run_of(tmp_path, "a_20260101000000", {"name": "a"}, age=0)
    assert newest_checkpoint(str(tmp_path), {"name": "a", "sam": 0.0, "mix": None}).path == str(path)
    found = newest_checkpoint(str(tmp_path), {"name": "a", "sam": 0.05, "mix": "cutmix"})
    assert found.content is None
    assert found.notes[0] == f"resume auto: passed over {path}, which has another sam, mix"


@pytest.mark.parametrize("best", [True, False])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, best):
    config = {"name": "a", "lr": 0.1}
    older = run_of(tmp_path, "a_20250101000000", config, age=9)
    damaged = run_of(tmp_path, "a_20260101000000", config, age=0, best=best)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    found = newest_checkpoint(str(tmp_path), config)
    assert found.path == str(damaged.with_name("model_best.pth.tar") if best else older)
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"resume auto: passed over {damaged}: is damaged")


def test_weights_of_others_are_no_run_to_go_on_with(tmp_path):
    path = run_of(tmp_path, "a_20260101000000", {"name": "a"}, age=0)
    content = read_checkpoint(path)
    torch.save({key: content[key] for key in MISLAS_KEYS}, path)
    found = newest_checkpoint(str(tmp_path), {"name": "a"})
    assert found.content is None
    assert "is not this trainer's" in found.notes[0]


def test_the_environment_is_what_last_bits_depend_on():
    now = environment(torch.device("cpu"))
    assert now == {
        "torch": torch.__version__,
        "device": torch.backends.cpu.get_cpu_capability(),
        "CPU threads": torch.get_num_threads(),
        "processes": 1,
    }
    assert all(type(value) in (str, int) for value in now.values())


# ---------------------------------------------------------------------------------------------------------------------
# The originals' files


def original_content(model, prefix="module."):
    """What MiSLAS's stage 1 saves: state dicts of DataParallel, a tensor and a NumPy scalar."""
    return {
        "epoch": 200,
        "state_dict_model": OrderedDict((prefix + k, v) for k, v in model.backbone.state_dict().items()),
        "state_dict_classifier": OrderedDict((prefix + k, v) for k, v in model.classifier.state_dict().items()),
        "best_acc1": torch.tensor([71.25]),
        "its_ece": np.float64(0.0321),
    }


def respell_numpy(path, module):
    """Makes the pickle in ``path`` name NumPy's scalars as the given module's, without touching anything else."""
    raw = path.read_bytes()

    def respelled(data):
        changed, times = re.subn(rb"numpy\.(_core|core)\.multiarray", module.encode(), data)
        assert times == 1
        return changed

    if not zipfile.is_zipfile(path):
        path.write_bytes(respelled(raw))
        return
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, respelled(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_a_file_of_mislas_loads(tmp_path, zipped, module, prefix):
    path, model = tmp_path / "model_best.pth.tar", small_model()
    torch.save(original_content(model, prefix), path, _use_new_zipfile_serialization=zipped)
    respell_numpy(path, module)
    assert module.encode() in path.read_bytes()
    assert read_checkpoint(path)["its_ece"] == 0.0321
    other = small_model(seed=1)
    loaded = load_weights(other, path)
    assert states_equal(other.state_dict(), model.state_dict())
    assert (loaded["epoch"], loaded["best_acc1"], loaded["class_map"]) == (200, 71.25, None)
    assert "MiSLAS" in loaded["source"]
    assert not is_ours(read_checkpoint(path))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numpy_scalars_load(tmp_path, kind):
    torch.save(original_content(small_model()) | {"its_ece": kind(3)}, tmp_path / "c")
    assert read_checkpoint(tmp_path / "c")["its_ece"] == 3


def test_a_file_without_epoch_and_accuracy_gives_weights(tmp_path):
    content = original_content(small_model())
    torch.save({key: content[key] for key in ("state_dict_model", "state_dict_classifier")}, tmp_path / "c")
    loaded = load_weights(small_model(seed=1), tmp_path / "c")
    assert (loaded["epoch"], loaded["best_acc1"]) == (0, None)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_scaling_of_stage_2_is_folded_into_the_classifier(tmp_path, prefix):
    scale, model, other = torch.tensor([1.3, 0.07, -2.9]), small_model(), small_model(seed=1)
    content = original_content(model) | {"state_dict_lws_model": {prefix + "learned_norm": scale[None]}}
    torch.save(content, tmp_path / "c")
    assert "scaling folded" in load_weights(other, tmp_path / "c")["source"]
    images = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.eval()(images), scale * model.eval()(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [{}, {"learned_norm": torch.ones(1, 4)}, {"other": torch.ones(1, 3)}])
def test_a_scaling_that_does_not_fit_is_refused(tmp_path, norm):
    torch.save(original_content(small_model()) | {"state_dict_lws_model": norm}, tmp_path / "c")
    assert "state_dict_lws_model" in refusal(lambda p: load_weights(small_model(), p), tmp_path / "c")


# ---------------------------------------------------------------------------------------------------------------------
# Another architecture


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"backbone": "resnet32"}, ""),
        ({"num_classes": 100}, "fc.weight is 10x64 in the file and 100x64 in the model"),
    ],
)
def test_another_architecture_is_refused_and_the_model_stays_as_it_was(saved, other, said):
    model = cifar_model(seed=1, **other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = refusal(lambda p: load_weights(model, p), saved)
    assert "another architecture" in message and said in message
    assert states_equal(model.state_dict(), before)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict_model": {}}, {"state_dict_model": 3}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c")
    assert "state_dict_" in refusal(lambda p: load_weights(small_model(), p), tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": "last"},
        {"best_acc1": [1.0, 2.0]},
        {"state_dict_lws_model": {"learned_norm": [1.0, 1.0, 1.0]}},
        {"state_dict_classifier": {"fc.weight": [1.0], "fc.bias": [1.0]}},
        {"state_dict_classifier": {0: torch.zeros(3, 5), "fc.bias": torch.zeros(3)}},
        {"state_dict_model": original_content(small_model())["state_dict_model"] | {"module.2.num_batches_tracked": 3}},
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path, change):
    torch.save(original_content(small_model()) | change, tmp_path / "c")
    refusal(lambda p: load_weights(small_model(), p), tmp_path / "c")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files and files of something else


def torch_file(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def damaged_files():
    whole, legacy = (torch_file(original_content(small_model()), zipped) for zipped in (True, False))
    yield pytest.param(b"", id="empty")
    for name, data in (("zip", whole), ("legacy", legacy)):
        for share in (0.01, 0.6, 0.99):
            yield pytest.param(data[: int(share * len(data))], id=f"{name} cut at {share}")
    yield pytest.param(np.random.default_rng(0).bytes(3000), id="random")
    yield pytest.param(b"lr: 0.1\nseed: 3\n", id="yaml")
    yield pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(100), id="image")
    yield pytest.param(torch_file(torch.zeros(3)), id="tensor")
    yield pytest.param(torch_file(7, zipped=False), id="number")
    yield pytest.param(pickle.dumps({"epoch": 1}, protocol=2), id="pickle of a dict")
    yield pytest.param(torch_file(small_model()), id="whole module")
    yield pytest.param(torch_file({"its_ece": np.zeros(3)}), id="NumPy array")


@pytest.mark.parametrize("data", list(damaged_files()))
def test_a_damaged_file_or_one_of_something_else_is_refused(tmp_path, data):
    path = tmp_path / "current.pth.tar"
    path.write_bytes(data)
    refusal(read_checkpoint, path)
    refusal(lambda path: load_weights(small_model(), path), path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such" in refusal(read_checkpoint, tmp_path / "nowhere.pth.tar")
    assert "is a folder; a run's last checkpoint is ckps/current.pth.tar" in refusal(read_checkpoint, tmp_path)


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["model_best.pth.tar", "weights.npz"])
@pytest.mark.parametrize("place", ["whole", "value", "weights", "key"])
@pytest.mark.parametrize("form", ["pickle", "pickle of protocol 2", "zip", "legacy"])
def test_a_file_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path, form, place, name):
    attack = Attack(tmp_path / "marker")
    content = {
        "whole": attack,
        "value": original_content(small_model()) | {"its_ece": attack},
        "weights": original_content(small_model()) | {"state_dict_model": {"module.1.weight": attack}},
        "key": {attack: 1},
    }[place]
    if form.startswith("pickle"):
        data = pickle.dumps(content, protocol=2 if "2" in form else None)
    else:
        data = torch_file(content, zipped=form == "zip")
    path = tmp_path / name
    path.write_bytes(data)
    message = refusal(read_checkpoint, path)
    assert place != "whole" or "unsafe" in message
    refusal(lambda p: load_weights(small_model(), p), path)
    assert not attack.marker.exists()
    if form.startswith("pickle"):  # the attack is real: unpickled, it makes its file
        pickle.loads(data)
    else:
        torch.load(path, weights_only=False)
    assert attack.marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Class maps


@pytest.mark.parametrize("stored", [[2, 0, 1], torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1], dtype=torch.int32)])
def test_a_class_map_may_be_a_list_or_a_tensor(stored):
    assert torch.equal(stored_class_map({"class_map": stored}, "c"), torch.tensor([2, 0, 1]))


@pytest.mark.parametrize("content", [{}, {"class_map": None}])
def test_a_checkpoint_may_have_no_class_map(content):
    assert stored_class_map(content, "c") is None


@pytest.mark.parametrize(
    "stored",
    [3, "legacy", "/etc/hostname", [], [[0], [1, 2]], [0.0, 1.0], torch.zeros(0), torch.eye(2).long(), {"a": 1}],
)
def test_any_other_class_map_is_refused(stored):
    with pytest.raises(CheckpointError, match=r"^c: its class_map is no list of whole numbers, one per class$"):
        stored_class_map({"class_map": stored}, "c")
