"""When a run's checkpoints are written: after every epoch, every so many steps, and where a signal ends the run."""

import contextlib
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from utils import distributed
from utils.checkpoint import TrainState, save_checkpoint
from utils.errors import DivergenceError, Interrupted
from utils.metrics import ADVICE, TrainMeter, check_weights
from utils.run.log import RunLog
from utils.signals import Signals


class Steps(Protocol):
    """What is asked of the loader."""

    def __len__(self) -> int:
        """Steps of an epoch."""

    def step_indices(self, epoch: int, step: int) -> list[int]:
        """Positions in the training set of a step's images."""


class Sums(Protocol):
    """What is summed up in an epoch beside the meter's."""

    def start_epoch(self, epoch: int) -> None:
        """From zero."""

    def rows(self) -> Tensor:
        """Those of every process."""

    def go_on(self, rows: Tensor | None) -> bool:
        """From the rows of an interrupted epoch; False where they are of something else."""


class Keeper:
    """Writes checkpoints of numbers that are finite; every process calls every method, rank 0 writes."""

    def __init__(
        self,
        run: RunLog,
        signals: Signals,
        state: TrainState,
        steps: Steps,
        meter: TrainMeter,
        every: int,
        content: Mapping,
        components: Sums | None = None,
        keep: Collection[int] = (),
    ):
        """``every``: steps from one checkpoint within an epoch to the next, 0: none; ``content``: what else
        :func:`save_checkpoint` takes; ``components``: of the diagnostics, None where there are none; ``keep``: after
        so many epochs a checkpoint is kept for good.
        """
        self.run, self.signals, self.state, self.steps, self.meter = run, signals, state, steps, meter
        self.every, self.content, self.components, self.keep = every, dict(content), components, keep
        self._kept = (state.epoch, state.step)

    def signal(self) -> int:
        """The number of a signal that this process got, or 0."""
        return self.signals.received

    def start_epoch(self) -> int:
        """The step at which the epoch goes on, with the sums of all steps before it; 0: it begins."""
        state = self.state
        if self.components:
            self.components.start_epoch(state.epoch)
        if state.step:
            self.meter.go_on(state.sums, state.step)
            if self.components and not self.components.go_on(state.components):
                self.run.info(
                    f"note: the diagnostics of epoch {state.epoch} begin at step {state.step}, with other rows"
                )
        return state.step

    def check(self) -> None:
        """Raises :class:`DivergenceError` on every process where one of them met a number that is not finite."""
        epoch, step = self.state.epoch, self.meter.first_bad_step()
        if step is not None:
            images = ", ".join(map(str, self.steps.step_indices(epoch, step)))
            raise DivergenceError(
                f"epoch {epoch}, step {step}: the loss or a logit is not finite ({ADVICE}); the step's images, by "
                f"their position in the training set: {images}"
            )

    def between_steps(self, done: int, seconds: float) -> None:
        """After ``done`` steps of the epoch, which took ``seconds``: a checkpoint where one is due.

        Raises :class:`Interrupted` on all processes after the same step where one of them got a signal.
        """
        self.state.step, self.state.seconds = done, seconds
        signal = distributed.greatest(self.signals.received)
        if signal:
            raise Interrupted(signal)
        due = self.every and done and done % self.every == 0
        if due and self._kept != (self.state.epoch, done):
            self._save_within_epoch()

    def end_epoch(self, row: Mapping) -> None:
        """The last checkpoint, the best one where this epoch is it, and one for good where ``keep`` has it.

        ``row``: of ``metrics.jsonl``.
        """
        best = ["model_best"] * self._advance(row)
        kept = [f"epoch_{self.state.epoch}"] * (self.state.epoch in self.keep)
        self._write(*best, *kept, "current")  # the last one last: who is killed in between does the epoch again

    def _advance(self, row: Mapping) -> bool:
        """Counts the epoch in; True where it is the best so far: on held-out images if there are any, else on test."""
        state = self.state
        state.epoch, state.step, state.seconds = row["epoch"] + 1, 0, 0.0
        state.sums = state.components = None
        chooser = row.get("val", row.get("test"))
        if chooser is None or chooser["top1"] <= state.best_acc1:
            return False
        state.best_acc1, state.its_ece = chooser["top1"], row["test"]["ece"]
        return True

    @contextlib.contextmanager
    def until_signal(self) -> Iterator[None]:
        """Around all epochs: a signal ends the block after the step (or in the evaluation) that it meets.

        What was trained until then is in ``current``; the :class:`Interrupted` that leaves says how to go on.
        """
        with self.signals.noted():
            try:
                yield
            except Interrupted as stop:
                self._save_within_epoch()
                raise Interrupted(stop.number, self._reached()) from None

    def _reached(self) -> str:
        state, path = self.state, self._path("current")
        words = ["--cfg", str(self.run.folder / "config.yaml"), "resume", str(path)]
        command = f"{distributed.launcher()} train_stage1.py {shlex.join(words)}"
        return f"epoch {state.epoch}, {state.step} of {len(self.steps)} steps, is kept; go on with: {command}"

    def _save_within_epoch(self) -> None:
        self.check()
        check_weights(self.content["model"], self.state.epoch)
        self.state.sums = self.meter.rows()
        self.state.components = self.components and self.components.rows()
        self._write("current")

    def _write(self, *names: str) -> None:
        """All wait for the one that writes: nobody's end may have the launcher end it."""
        self.state.log_size = self.run.size()
        self.signals.saving = True
        try:
            for name in names if distributed.is_main() else ():
                self._path(name).parent.mkdir(exist_ok=True)
                save_checkpoint(self._path(name), state=self.state, **self.content)
            distributed.barrier()
        finally:
            self.signals.saving = False
        self._kept = (self.state.epoch, self.state.step)

    def _path(self, name: str) -> Path:
        return self.run.folder / "ckps" / f"{name}.pth.tar"
