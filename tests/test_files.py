"""Files that are either whole or not there, also when a process dies while it writes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import atomic_file, named, write_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[None, "old"], ids=["new file", "replaced file"])
def old(request, tmp_path):
    """The bytes that ``tmp_path / "file"`` has before the test, None where it is not there."""
    if request.param is None:
        return None
    (tmp_path / "file").write_text(request.param)
    return request.param.encode()


def content(folder):
    """name -> bytes of all files in ``folder``."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(old):
    return {} if old is None else {"file": old}


@pytest.mark.parametrize(
    ("mode", "data", "stored"), [("wb", b"\x00\r\n\xff", b"\x00\r\n\xff"), ("w", "ü\r\n\n", b"\xc3\xbc\r\n\n")]
)
def test_content_appears_unchanged_when_the_block_ends(tmp_path, old, mode, data, stored):
    with atomic_file(tmp_path / "file", mode) as handle:
        handle.write(data)
        handle.flush()
        assert content(tmp_path).get("file") == old
    assert content(tmp_path) == {"file": stored}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path, old, error):
    with pytest.raises(error), atomic_file(tmp_path / "file") as handle:
        handle.write(b"half")
        raise error
    assert content(tmp_path) == expected(old)


def test_a_target_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "file", "new")


def test_a_process_killed_while_writing_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path, old):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from utils.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as handle:\n"
        "    handle.write(b'half' * 10_000)\n"
        "    handle.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "file"
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert content(tmp_path).get("file") == old
    assert len(content(tmp_path)) == (old is not None) + 1  # what the dead process had written so far
    write_text(path, "new")
    assert content(tmp_path) == {"file": b"new"}


def test_text_is_written_as_it_is(tmp_path, old):
    write_text(tmp_path / "file", "Zeile 1\n中\r\n")
    assert content(tmp_path) == {"file": "Zeile 1\n中\r\n".encode()}


def test_an_error_of_the_disk_gets_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError) as error, named(tmp_path / "x"):
        raise OSError(28, "No space left")
    assert (error.value.errno, error.value.strerror, error.value.filename) == (28, "No space left", str(tmp_path / "x"))
    (tmp_path / ".y.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        write_text(tmp_path / "y", "text")
    assert error.value.filename == str(tmp_path / "y")
    assert list(tmp_path.iterdir()) == []
