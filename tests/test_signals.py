"""Signals: real ones, sent to real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from utils.errors import Interrupted
from utils.signals import NAMES, WITH_PARENT, Signals, kept_from_children

HEAD = """
import os, signal, sys, time
from utils.command_line import exit_code
from utils.signals import Signals, kept_from_children, obey_the_parent

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may ignore it

def say(word):
    print(word, flush=True)
"""


def started(body: str, **options) -> subprocess.Popen:
    """A process that runs ``body`` after ``HEAD``."""
    command = [sys.executable, "-c", HEAD + body]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


def heard(process: subprocess.Popen, word: str) -> None:
    assert process.stdout.readline() == f"{word}\n", process.stderr.read()


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_at_once_with_its_code_and_one_line(name):
    process = started("""
def main():
    with Signals():
        say("ready")
        time.sleep(30)
sys.exit(exit_code(main))
""")
    heard(process, "ready")
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + getattr(signal, name)
    assert err == f"stopped by {name}\n"


def test_a_signal_is_only_noted_and_later_ones_are_ignored():
    process = started("""
with Signals() as signals:
    with signals.noted():
        say("ready")
        while not signals.received:
            time.sleep(0.01)
        say("noted")
        sys.stdin.readline()
        say(signals.received)
    say("left")
""")
    heard(process, "ready")
    process.send_signal(signal.SIGUSR1)
    heard(process, "noted")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process.send_signal(number)
    out, err = process.communicate("\n", timeout=10)
    assert (process.returncode, out, err) == (0, f"{int(signal.SIGUSR1)}\nleft\n", "")


def test_a_process_that_does_not_end_in_time_is_ended_unless_it_saves():
    """The main thread waits inside a library, where no Python handler runs."""
    body = """
import threading
with Signals(grace=1.0) as signals, signals.noted():
    signals.saving = SAVING
    say("ready")
    if SAVING:
        threading.Timer(3.0, lambda: os._exit(7)).start()
    import ctypes
    while True:
        ctypes.CDLL(None).pause()
"""
    for saving, code, line in (
        (False, 128 + signal.SIGTERM, "did not end within 1 s; what no checkpoint holds is lost\n"),
        (True, 7, ""),
    ):
        process = started(body.replace("SAVING", str(saving)))
        heard(process, "ready")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
        assert process.returncode == code
        assert err.endswith(line)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("launched", ["TORCHELASTIC_RUN_ID", WITH_PARENT, ""])
def test_a_process_whose_launcher_is_gone_ends_and_any_other_stays(tmp_path, launched):
    """A launcher that is killed in the real sense; without one (nohup, a closed shell) a new parent means nothing."""
    child = (
        HEAD
        + f"""
def main():
    with Signals():
        open({str(tmp_path / "ready")!r}, "w").write(str(os.getpid()))
        time.sleep(6)
        open({str(tmp_path / "stayed")!r}, "w").close()
sys.exit(exit_code(main))
"""
    )
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    environment |= {launched: "x"} if launched else {}
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text())
    process.kill()
    process.wait()
    pid = int((tmp_path / "ready").read_text())
    wait_for(lambda: not os.path.exists(f"/proc/{pid}") or ended(pid))
    assert (tmp_path / "stayed").exists() is not bool(launched)


def wait_for(fact, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(pid: int) -> bool:
    """Whether nobody but a parent that asks no more knows it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_children_do_not_get_the_group_s_signals_and_obey_their_parent():
    process = started(
        """
import multiprocessing

def child(ready):
    obey_the_parent()
    ready.set()
    time.sleep(60)

with Signals() as signals, signals.noted():
    ready = multiprocessing.get_context("fork").Event()
    with kept_from_children():
        worker = multiprocessing.get_context("fork").Process(target=child, args=(ready,))
        worker.start()
    ready.wait()
    say("ready")
    sys.stdin.readline()
    worker.join(1)
    say((worker.is_alive(), signals.received))
    worker.terminate()
    worker.join(10)
    say(worker.exitcode)
""",
        start_new_session=True,
    )
    heard(process, "ready")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.killpg(process.pid, number)
        time.sleep(0.1)
    out, err = process.communicate("\n", timeout=20)
    assert (out, err) == (f"(True, {int(signal.SIGINT)})\n0\n", "")


def test_afterwards_everything_is_as_it_was():
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    for _ in range(3):
        with Signals() as signals:
            assert signal.getsignal(signal.SIGTERM) != before[0]
        with kept_from_children():
            assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert wakeup == -1
    assert not signals._thread.is_alive()


def test_a_signal_that_nohup_ignores_stays_ignored():
    process = started("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Signals() as signals:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.2)
    say(signals.received)
""")
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "0\n", "")


def test_one_that_came_before_it_could_be_raised_is_not_lost():
    with Signals() as signals:
        signals.received = int(signal.SIGTERM)
        with pytest.raises(Interrupted), signals.noted():
            raise AssertionError
