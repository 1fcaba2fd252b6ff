"""Where numbers come from, asked of real git checkouts and of this machine."""

import subprocess

import pytest
import torch

from utils.run.provenance import commit, machine

IDENTITY = ["-c", "user.name=n", "-c", "user.email=n@example.org"]


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""
    git = ["git", "-C", str(tmp_path), *IDENTITY]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.txt").write_text("one")
    subprocess.run([*git, "add", "a.txt"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    return tmp_path


def head(folder):
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_a_checkout_names_its_commit_and_says_where_known_files_have_changed(checkout):
    (checkout / "new.txt").write_text("git does not know it")
    assert commit(checkout) == head(checkout)
    (checkout / "a.txt").write_text("two")
    assert commit(checkout) == f"{head(checkout)}-dirty"


def test_a_tag_does_not_replace_the_commit(checkout):
    subprocess.run(["git", "-C", str(checkout), *IDENTITY, "tag", "-a", "v1", "-m", "v1"], check=True)
    assert commit(checkout) == head(checkout)


def test_sources_without_git_have_no_commit(tmp_path, checkout, monkeypatch):
    inside = checkout / "unpacked"
    inside.mkdir()
    assert commit(inside) == ""  # the commit around it is not its own
    monkeypatch.setenv("PATH", str(inside))
    assert commit(checkout) == ""


def test_a_damaged_checkout_has_no_commit(tmp_path):
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) == ""


def test_the_machine_is_named():
    found = machine(torch.device("cpu"))
    assert found["device"] == "cpu" and found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["versions"].keys() == {"python", "torch", "torchvision", "numpy", "pillow"}
    assert found["versions"]["torch"] == torch.__version__
