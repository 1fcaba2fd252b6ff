"""Signals: real ones, sent to real processes."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.scripts import Scripts, forked_scripts, script_of, until, wait_for  # noqa: F401
from utils.errors import Interrupted
from utils.signals import NAMES, WITH_PARENT, Signals, kept_from_children

HEAD = """
import os, signal, sys, time
from pathlib import Path
from utils.command_line import exit_code
from utils.signals import Signals, kept_from_children, obey_the_parent

def say(word):
    print(word, flush=True)

def wait_for(name):
    while not Path(__file__).with_name(name).exists():
        time.sleep(0.01)
"""


@contextlib.contextmanager
def running(scripts: Scripts, folder: Path, body: str, **variables: str):
    """A process that runs ``body`` and has said "ready"."""
    with scripts.alive(folder, script_of(folder, HEAD + body), **variables) as run:
        assert until(lambda: "ready\n" in run.out(), run, 20), run.err()
        yield run


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_at_once_with_its_code_and_one_line(scripts, tmp_path, name):
    body = """
def main():
    with Signals():
        say("ready")
        time.sleep(30)
sys.exit(exit_code(main))
"""
    with running(scripts, tmp_path, body) as run:
        run.process.send_signal(getattr(signal, name))
        assert run.process.wait(10) == 128 + getattr(signal, name)
        assert run.err() == f"stopped by {name}\n"


def test_a_signal_is_only_noted_and_later_ones_are_ignored(scripts, tmp_path):
    body = """
with Signals() as signals:
    with signals.noted():
        say("ready")
        while not signals.received:
            time.sleep(0.01)
        say("noted")
        wait_for("go")
        say(signals.received)
    say("left")
"""
    with running(scripts, tmp_path, body) as run:
        run.process.send_signal(signal.SIGUSR1)
        assert until(lambda: "noted\n" in run.out(), run, 20)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            run.process.send_signal(number)
        (tmp_path / "go").touch()
        assert run.process.wait(10) == 0
        assert (run.out(), run.err()) == (f"ready\nnoted\n{int(signal.SIGUSR1)}\nleft\n", "")


@pytest.mark.parametrize(("saving", "code"), [(False, 128 + signal.SIGTERM), (True, 7)])
def test_a_process_that_does_not_end_in_time_is_ended_unless_it_saves(scripts, tmp_path, saving, code):
    """The main thread waits inside a library, where no Python handler runs."""
    body = f"""
import ctypes, threading
with Signals(grace=0.5) as signals, signals.noted():
    signals.saving = {saving}
    say("ready")
    if signals.saving:
        threading.Timer(2.0, lambda: os._exit(7)).start()
    while True:
        ctypes.CDLL(None).pause()
"""
    with running(scripts, tmp_path, body) as run:
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(20) == code
        line = "stopped by SIGTERM: still running after 0.5 s; steps since the last checkpoint are lost\n"
        assert run.err() == ("" if saving else line)


@pytest.mark.parametrize("launched", ["TORCHELASTIC_RUN_ID", WITH_PARENT, ""])
def test_a_process_whose_launcher_is_gone_ends_and_any_other_stays(scripts, tmp_path, launched):
    """A launcher that is really killed; without one (nohup, a closed shell) a new parent means nothing."""
    body = """
def main():
    if os.fork():
        time.sleep(60)
    with Signals():
        Path(__file__).with_name("child").write_text(str(os.getpid()))
        say("ready")
        time.sleep(1.5)
        Path(__file__).with_name("stayed").touch()
sys.exit(exit_code(main))
"""
    with running(scripts, tmp_path, body, **({launched: "x"} if launched else {})) as run:
        pid = int((tmp_path / "child").read_text())
        run.process.kill()
        run.process.wait()
        code = []
        wait_for(lambda: code or code.extend(number for got, number in [os.waitpid(pid, os.WNOHANG)] if got))
    assert os.waitstatus_to_exitcode(code[0]) == (128 + signal.SIGTERM if launched else 0)
    assert (tmp_path / "stayed").exists() is not bool(launched)


def test_children_do_not_get_the_group_s_signals_and_obey_their_parent(scripts, tmp_path):
    body = """
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
    wait_for("go")
    worker.join(1)
    say((worker.is_alive(), signals.received))
    worker.terminate()
    worker.join(10)
    say(worker.exitcode)
"""
    with running(scripts, tmp_path, body) as run:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.killpg(run.process.pid, number)
            time.sleep(0.1)
        (tmp_path / "go").touch()
        run.process.wait(20)
        assert (run.out(), run.err()) == (f"ready\n(True, {int(signal.SIGINT)})\n0\n", "")


def test_afterwards_everything_is_as_it_was():
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    threads = threading.enumerate()
    for _ in range(3):
        with Signals():
            assert signal.getsignal(signal.SIGTERM) != before[0]
            assert len(threading.enumerate()) == len(threads) + 1
        with kept_from_children():
            assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert wakeup == -1
    assert threading.enumerate() == threads


def test_a_signal_that_nohup_ignores_stays_ignored(scripts, tmp_path):
    body = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Signals() as signals:
    say("ready")
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.2)
    say(signals.received)
"""
    with running(scripts, tmp_path, body) as run:
        assert run.process.wait(10) == 0
        assert (run.out(), run.err()) == ("ready\n0\n", "")


def test_one_that_came_before_it_could_be_raised_is_not_lost():
    with Signals() as signals:
        signals.received = int(signal.SIGTERM)
        with pytest.raises(Interrupted), signals.noted():
            raise AssertionError
