"""Signals that stop a run: between two steps, with a checkpoint, and with exit code 128 + signal."""

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from utils.errors import Interrupted

# Sent by users, launchers and schedulers (SIGINT also where a shell has started the job with it ignored), and by a
# terminal that closes, unless nohup has SIGHUP ignored.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
WITH_PARENT = "ENDS_WITH_ITS_PARENT"  # environment variable: end when the parent process is gone
GRACE = 25.0  # seconds from the first signal to a forced exit; launchers kill after 30


class Signals:
    """Handle the first signal of ``NAMES`` inside the block; ignore all later ones.

    The signal raises :class:`Interrupted`, or inside :meth:`noted` only sets ``received`` to its number. The end of the
    launcher (or of another parent, see ``WITH_PARENT``) counts as a SIGTERM. ``grace`` seconds after the signal the
    process is forced to exit (a step may take too long, or wait for a process that is gone), unless it is ``saving``.
    """

    def __init__(self, grace: float = GRACE):
        self.grace = grace
        self.received = 0
        self.saving = False
        self._only_noted = False
        self._parent = os.getppid() if {"TORCHELASTIC_RUN_ID", WITH_PARENT} & os.environ.keys() else None

    def __enter__(self) -> "Signals":
        self._active = threading.current_thread() is threading.main_thread()  # only this one may install handlers
        if not self._active:
            return self
        known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        hung_up = getattr(signal, "SIGHUP", None)
        numbers = [n for n in known if n != hung_up or signal.getsignal(n) is not signal.SIG_IGN]
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        # Wakes the watching thread even while the main thread waits inside a library.
        self._wakeup_before = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._thread = threading.Thread(target=self._watch, args=(set(numbers),), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._active:
            return
        for number, handler in self._before.items():
            # Ignored after a signal: another one between here and the exit would change the exit code.
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._outbox.send(b"\0")  # no signal has this number
        self._thread.join()
        self._inbox.close()
        self._outbox.close()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the block a signal only sets ``received``; the caller checks it and stops at a convenient point."""
        if self.received:  # its exception was lost: raised in a destructor, say
            raise Interrupted(self.received)
        self._only_noted = True
        try:
            yield
        finally:
            self._only_noted = False

    def _handle(self, number: int, frame: object) -> None:
        if self.received:
            return
        self.received = number
        if not self._only_noted:
            raise Interrupted(number)

    def _watch(self, numbers: set[int]) -> None:
        first, since = 0, 0.0
        while True:
            readable, _, _ = select.select([self._inbox], [], [], 0.5)
            numbers_received = self._inbox.recv(4096) if readable else b""
            if 0 in numbers_received:
                return
            if not first:
                first, since = next((n for n in numbers_received if n in numbers), 0), time.monotonic()
            if not first and self._parent is not None and self._parent != os.getppid():
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            if first and not self.saving and time.monotonic() - since > self.grace:
                self._force_exit(first)

    def _force_exit(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        line = f"stopped by {name}: still running after {self.grace:g} s; steps since the last checkpoint are lost\n"
        with contextlib.suppress(OSError):  # a closed terminal must not keep the process alive
            sys.stderr.write(line)
            sys.stderr.flush()
        os._exit(128 + number)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Block the signals in processes started inside the block: launchers and terminals signal whole process groups.

    They stay blocked there for good. This process receives its own when the block ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {getattr(signal, name) for name in NAMES}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_the_parent(worker: int = 0) -> None:
    """End this child, started inside :func:`kept_from_children`, on a SIGTERM from its parent only."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = multiprocessing.parent_process()  # under forkserver not the same as os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="parent", daemon=True).start()
