"""Write a run's checkpoints: after every epoch, every few steps, and when a signal stops the run."""

import contextlib
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from datasets.loaders import TrainLoader
from methods.component_meter import ComponentMeter
from utils import distributed, launcher
from utils.checkpoint import TrainState, save_checkpoint
from utils.errors import DivergenceError, Interrupted
from utils.meter import ADVICE, TrainMeter, check_weights
from utils.run.log import RunLog
from utils.signals import Signals


class CheckpointManager:
    """Saves checkpoints whose values are finite. All processes call every method; rank 0 writes."""

    def __init__(
        self,
        run: RunLog,
        signals: Signals,
        state: TrainState,
        loader: TrainLoader,
        meter: TrainMeter,
        every: int,
        content: Mapping,
        components: ComponentMeter | None = None,
        keep: Collection[int] = (),
    ):
        """
        Args:
            every: Steps between checkpoints within an epoch; 0: none.
            content: The remaining arguments of :func:`save_checkpoint`.
            components: Diagnostics that a checkpoint within an epoch includes.
            keep: Numbers of finished epochs whose checkpoint is kept as ``epoch_<N>``.
        """
        self.run, self.signals, self.state, self.loader, self.meter = run, signals, state, loader, meter
        self.every, self.content, self.components, self.keep = every, dict(content), components, keep
        self._saved = (state.epoch, state.step)

    def signal(self) -> int:
        """Return the number of the signal that this process has received, or 0."""
        return self.signals.received

    def start_epoch(self) -> int:
        """Return the first step of (the rest of) the epoch, and restore the sums of the steps before."""
        state = self.state
        if self.components:
            self.components.start_epoch(state.epoch)
        if state.step:
            self.meter.load_rows(state.sums, state.step)
            if self.components and not self.components.load_rows(state.components):
                self.run.info(
                    f"note: the diagnostics of epoch {state.epoch} start at step {state.step}: their rows have changed"
                )
        return state.step

    def check(self) -> None:
        """Raise :class:`DivergenceError` on all processes if a loss or logit of one of them was not finite."""
        epoch, step = self.state.epoch, self.meter.first_bad_step()
        if step is not None:
            images = ", ".join(map(str, self.loader.step_indices(epoch, step)))
            raise DivergenceError(
                f"epoch {epoch}, step {step}: the loss or a logit is not finite ({ADVICE}); indices of the step's "
                f"training images: {images}"
            )

    def between_steps(self, done: int, seconds: float) -> None:
        """Save a checkpoint if one is due after ``done`` steps of the epoch, which took ``seconds``.

        Raises :class:`Interrupted` on all processes after the same step if one of them has received a signal.
        """
        self.state.step, self.state.seconds = done, seconds
        signal = distributed.greatest(self.signals.received)
        if signal:
            raise Interrupted(signal)
        due = self.every and done and done % self.every == 0
        if due and self._saved != (self.state.epoch, done):
            self._save_within_epoch()

    def end_epoch(self, row: Mapping) -> None:
        """Save ``current``, ``model_best`` if this epoch is the best, and ``epoch_<N>`` if it is to be kept.

        ``row``: of ``metrics.jsonl``.
        """
        best = ["model_best"] * self._advance(row)
        kept = [f"epoch_{self.state.epoch}"] * (self.state.epoch in self.keep)
        self._write(*best, *kept, "current")  # current last: a run killed in between repeats the epoch

    def _advance(self, row: Mapping) -> bool:
        """Advance to the next epoch; return True if this one is the best so far, on held-out images if any."""
        state = self.state
        state.epoch, state.step, state.seconds = row["epoch"] + 1, 0, 0.0
        state.sums = state.components = None
        selection = row.get("val", row.get("test"))
        if selection is None or selection["top1"] <= state.best_acc1:
            return False
        state.best_acc1, state.its_ece = selection["top1"], row["test"]["ece"]
        return True

    @contextlib.contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """Stop the block after the current step or evaluation batch when a signal arrives, and save ``current``.

        The :class:`Interrupted` that is raised has the command that resumes.
        """
        with self.signals.noted():
            try:
                yield
            except Interrupted as stop:
                self._save_within_epoch()
                raise Interrupted(stop.number, self._reached()) from None

    def _reached(self) -> str:
        state, path = self.state, self._path("current")
        arguments = ["--cfg", str(self.run.folder / "config.yaml"), "resume", str(path)]
        resume = launcher.how_to_resume(f"train_stage1.py {shlex.join(arguments)}")
        return f"epoch {state.epoch}, {state.step} of {len(self.loader)} steps, is saved; {resume}"

    def _save_within_epoch(self) -> None:
        self.check()
        check_weights(self.content["model"], self.state.epoch)
        self.state.sums = self.meter.rows()
        self.state.components = self.components and self.components.rows()
        self._write("current")

    def _write(self, *names: str) -> None:
        """All ranks wait for rank 0: a rank that exits first would make the launcher kill it while it writes."""
        self.state.log_size = self.run.size()
        self.signals.saving = True
        try:
            for name in names if distributed.is_main() else ():
                self._path(name).parent.mkdir(exist_ok=True)
                save_checkpoint(self._path(name), state=self.state, **self.content)
            distributed.barrier()
        finally:
            self.signals.saving = False
        self._saved = (self.state.epoch, self.state.step)

    def _path(self, name: str) -> Path:
        return self.run.folder / "ckps" / f"{name}.pth.tar"
