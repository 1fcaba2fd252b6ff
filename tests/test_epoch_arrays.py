"""Arrays by epoch in real files: continued, truncated and damaged."""

import numpy as np
import pytest

from utils.errors import InputError
from utils.run.epoch_arrays import EpochArrays, read_arrays

FIXED = {"rows": np.array([3, 1])}


def add(arrays, *epochs):
    for epoch in epochs:
        arrays.add(epoch, {"a": np.full(2, epoch, np.float32), "n": np.int64(epoch), "table": np.eye(2) * epoch})


@pytest.fixture
def path(tmp_path):
    add(EpochArrays(tmp_path / "x.npz", FIXED, 0, ["table"]), 0, 1, 2)
    return tmp_path / "x.npz"


def test_a_row_per_epoch(path):
    stored = read_arrays(path)
    assert set(stored) == {"epochs", "a", "n", "rows", "table"}
    assert stored["epochs"].tolist() == stored["n"].tolist() == [0, 1, 2]
    assert stored["a"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert stored["a"].dtype == np.float32
    assert stored["rows"].tolist() == [3, 1]
    assert stored["table"].tolist() == [[2, 0], [0, 2]]


def test_continuing_after_the_last_epoch_leaves_the_file_unchanged(path):
    before = path.read_bytes()
    EpochArrays(path, FIXED, 3, ["table"])
    assert path.read_bytes() == before


def test_resuming_earlier_drops_later_epochs_and_the_last_table(path):
    arrays = EpochArrays(path, FIXED, 1, ["table"])
    assert read_arrays(path)["epochs"].tolist() == [0]
    assert "table" not in read_arrays(path)
    add(arrays, 1)
    assert read_arrays(path)["a"].tolist() == [[0, 0], [1, 1]]
    assert read_arrays(path)["table"].tolist() == [[1, 0], [0, 1]]


def test_resuming_at_epoch_0_drops_all_rows(path):
    arrays = EpochArrays(path, FIXED, 0, ["table"])
    assert read_arrays(path)["epochs"].tolist() == []
    add(arrays, 0)
    assert read_arrays(path)["epochs"].tolist() == [0]


def test_other_fixed_arrays_are_refused(path):
    with pytest.raises(InputError, match=r"x\.npz: was begun with other rows"):
        EpochArrays(path, {"rows": np.array([3, 2])}, 3)


def test_a_damaged_file_is_named(path):
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"x\.npz: is damaged"):
        EpochArrays(path, FIXED, 3)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.npz: is damaged"):
        read_arrays(path)


def test_objects_in_a_file_are_not_run(path):
    np.savez(path, epochs=np.array([print], dtype=object))
    with pytest.raises(InputError, match=r"x\.npz: is damaged"):
        read_arrays(path)


def test_arrays_of_unequal_length_are_damage(path):
    np.savez(path, **FIXED, epochs=np.arange(2), a=np.zeros((3, 2)))
    with pytest.raises(InputError, match="not of one length"):
        EpochArrays(path, FIXED, 3)


def test_arrays_of_another_version_are_refused(path):
    arrays = EpochArrays(path, FIXED, 3, ["table"])
    with pytest.raises(InputError, match=r"x\.npz: has other arrays than this version writes"):
        arrays.add(3, {"a": np.zeros(2), "n": np.int64(3), "new": np.zeros(2)})
    with pytest.raises(InputError, match=r"x\.npz: has other arrays than this version writes"):
        arrays.add(3, {"a": np.zeros(3), "n": np.int64(3)})
    assert read_arrays(path)["epochs"].tolist() == [0, 1, 2]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"gone.*x\.npz"):
        add(EpochArrays(tmp_path / "gone" / "x.npz", FIXED, 0), 0)
