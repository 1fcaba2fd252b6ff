"""Where image files lie: names of every kind in one block of bytes."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.source import DataError, ImageFiles, as_text
from utils.errors import InputError

UNDECODABLE = os.fsdecode(b"caf\xe9/\xff.jpg")  # Latin-1, no UTF-8
NAMES = ["a.jpg", "Äste/日本 🌲.jpg", UNDECODABLE, "deep/er/than the others/b.jpg", "a.jpg"]
file_names = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name).map(os.fsdecode)


@pytest.mark.parametrize("root", ["/data", Path("/data"), "data", "/Bäume/\udce9"])
def test_paths_lie_under_the_root_with_their_names_as_given(root):
    files = ImageFiles.under(root, NAMES)
    assert len(files) == len(NAMES)
    assert [files.path(i) for i in range(len(files))] == [f"{root}/{name}" for name in NAMES]


@given(names=st.lists(file_names, max_size=8))
def test_any_name_that_a_file_can_have_comes_back(names):
    files = ImageFiles.under("", names)
    assert [files.path(i) for i in range(len(files))] == names


@pytest.mark.parametrize("name", NAMES)
def test_the_operating_system_finds_the_file(tmp_path, name):
    place = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    Path(os.fsdecode(place)).write_bytes(b"pixels")
    assert Path(ImageFiles.under(tmp_path, [name]).path(0)).read_bytes() == b"pixels"


def test_a_position_may_be_a_number_of_numpy():
    assert ImageFiles.under("/data", NAMES).path(np.int64(3)) == f"/data/{NAMES[3]}"


@pytest.mark.parametrize("chosen", [[3, 0, 2], [1, 1], [], [4]])
def test_selected_files_come_in_the_order_chosen_and_leave_the_others_alone(chosen):
    files = ImageFiles.under("/data", NAMES)
    selected = files.select(np.array(chosen, dtype=np.int64))
    assert [selected.path(i) for i in range(len(selected))] == [f"/data/{NAMES[i]}" for i in chosen]
    assert [files.path(i) for i in range(len(files))] == [f"/data/{name}" for name in NAMES]


def test_there_may_be_no_files():
    assert len(ImageFiles.under("/data", [])) == 0


def test_names_are_one_block_without_python_objects():
    names = ImageFiles.under("/data", NAMES).names
    assert (names.dtype.kind, names.shape) == ("S", (len(NAMES),))
    assert names.nbytes == len(NAMES) * max(len(os.fsencode(name)) for name in NAMES)


def test_a_copy_in_another_process_is_the_same():
    """Workers that do not fork get the files pickled."""
    files = pickle.loads(pickle.dumps(ImageFiles.under("/data", NAMES)))
    assert [files.path(i) for i in range(len(files))] == [f"/data/{name}" for name in NAMES]


@given(name=file_names)
def test_any_name_is_text_that_a_file_can_hold(name):
    as_text(name).encode()


def test_names_in_utf_8_stay_as_they_are():
    assert [as_text(name) for name in NAMES[:3]] == [*NAMES[:2], "caf\\xe9/\\xff.jpg"]


def test_bad_data_are_bad_input_and_the_message_survives_another_process():
    """Scripts end with one line on bad input; workers hand their errors over pickled."""
    error = pickle.loads(pickle.dumps(DataError("a.jpg: no such image")))
    assert isinstance(error, InputError)
    assert str(error) == "a.jpg: no such image"
