"""Signals that ask a run to end. It ends between two steps, with a checkpoint, and with exit code 128 + signal."""

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

from utils.errors import Interrupted

# What users, launchers and schedulers send, also to a job that its shell has started with SIGINT ignored; and what a
# closed terminal sends, unless nohup had it ignored.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
WITH_PARENT = "ENDS_WITH_ITS_PARENT"  # set in a process's environment: it ends where its parent is gone
GRACE = 25.0  # seconds from the first signal to the end, come what may: launchers kill after 30


class Signals:
    """Inside the block the first signal of ``NAMES`` ends the process, and further ones are ignored.

    It raises :class:`Interrupted` at once, or within :meth:`noted` leaves its number in ``received``. A process whose
    launcher (or other parent, see ``WITH_PARENT``) is gone ends as if it had got a SIGTERM. One that has not ended
    ``grace`` seconds after the signal (a step takes too long, or waits for a process that is gone) ends there, unless
    it is ``saving``.
    """

    def __init__(self, grace: float = GRACE):
        self.grace = grace
        self.received = 0
        self.saving = False
        self._only_noted = False
        self._parent = os.getppid() if {"TORCHELASTIC_RUN_ID", WITH_PARENT} & os.environ.keys() else None

    def __enter__(self) -> "Signals":
        self._active = threading.current_thread() is threading.main_thread()  # no other may install handlers
        if not self._active:
            return self
        known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        hung_up = getattr(signal, "SIGHUP", None)
        numbers = [n for n in known if n != hung_up or signal.getsignal(n) is not signal.SIG_IGN]
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        # The thread hears of a signal although the main thread may be waiting inside a library.
        self._wakeup_before = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._thread = threading.Thread(target=self._watch, args=(set(numbers),), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._active:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._outbox.send(b"\0")  # no signal has this number
        self._thread.join()
        self._inbox.close()
        self._outbox.close()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the block a signal only sets ``received``: whoever reads it ends in an orderly way."""
        if self.received:  # came while nothing could be raised, such as in a destructor
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
            heard = self._inbox.recv(4096) if readable else b""
            if 0 in heard:
                return
            if not first:
                first, since = next((n for n in heard if n in numbers), 0), time.monotonic()
            if not first and self._parent not in (None, os.getppid()):
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            if first and not self.saving and time.monotonic() - since > self.grace:
                name = signal.Signals(first).name
                sys.stderr.write(
                    f"stopped by {name}: did not end within {self.grace:g} s; what no checkpoint holds is lost\n"
                )
                sys.stderr.flush()
                os._exit(128 + first)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """For processes that this thread starts inside the block: launchers signal whole process groups, terminals too.

    The signals stay blocked in them for good; this process gets its own all the same.
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
    """In a child from within :func:`kept_from_children`: a SIGTERM ends it if it is the parent's own."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = multiprocessing.parent_process()  # with forkserver it is not the process's own parent

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="parent", daemon=True).start()
