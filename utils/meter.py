"""Running sums of training, kept on the device."""

import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import DivergenceError

ADVICE = "a smaller lr, more warmup_epochs or max_grad_norm may help"
NEVER = torch.iinfo(torch.int64).max  # later than any step
SUMS = ("loss", "top-1 hits", "top-5 hits", "samples", "clamped_logits", "skipped_steps")


class TrainMeter:
    """Sums over the steps of an epoch, and the first step whose loss or logits (before any clamp) are not finite.

    Everything is updated in place on the device, so that a CUDA graph can do it; only reading synchronises.
    """

    def __init__(self, device: torch.device, clamp: float | None = None):
        """``clamp``: count logits beyond +-this; None: the loss does not clamp."""
        self.clamp = clamp
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.last = torch.zeros(4, dtype=torch.float64, device=device)  # the last micro-batch's first four
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # finished
        self.first_bad = torch.full((), NEVER, device=device)

    def tensors(self) -> list[Tensor]:
        """The state, for a CUDA graph to save and restore."""
        return [self.sums, self.last, self.steps, self.first_bad]

    def reset(self) -> None:
        for tensor in (self.sums, self.last, self.steps):
            tensor.zero_()
        self.first_bad.fill_(NEVER)

    def rows(self) -> Tensor:
        """Gather the sums of all W processes, float64 [W, len(SUMS)] on the CPU, for :meth:`load_rows`."""
        return distributed.gather_rows(self.sums[None]).cpu()

    def load_rows(self, rows: Tensor, steps: int) -> None:
        """Restore the sums after ``steps`` steps of an epoch; exact if the number of processes is unchanged."""
        rank = distributed.rank()
        same_size = distributed.world_size() == len(rows)
        self.sums.copy_(rows[rank] if same_size else rows.sum(dim=0) * (rank == 0))
        self.steps.fill_(steps)

    @torch.no_grad()
    def update(
        self, loss: Tensor, logits: Tensor, targets: Tensor, weight: float = 1.0, ends_step: bool = True
    ) -> None:
        """Add one micro-batch with mean ``loss``; under mixup, hits are counted against the unmixed ``targets [B]``.

        A micro-batch of ``weight`` 0 is checked for non-finite values but not counted.
        """
        size = len(targets)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # [B, 5]
        values = (loss.double() * size, top[:, 0].sum(), top.sum(), torch.full((), size, device=logits.device))
        self.last.copy_(torch.stack([value.double() for value in values]))
        if weight > 0:
            self.sums[:4] += self.last
            if self.clamp is not None:
                self.sums[4] += (logits.abs() > self.clamp).sum()
        bad = ~(torch.isfinite(loss) & torch.isfinite(logits).all())
        self.first_bad.copy_(torch.where(bad, self.first_bad.clamp(max=self.steps), self.first_bad))
        if ends_step:
            self.steps += 1

    @torch.no_grad()
    def skipped(self, overflow: Tensor) -> None:
        """Count a step that fp16 skips because its gradients overflowed (1, else 0)."""
        if distributed.is_main():  # all processes skip the same steps
            self.sums[5] += overflow.reshape(())

    def first_bad_step(self) -> int | None:
        """Return the first step with a non-finite value on any process, or None; the same on all processes."""
        step = int(distributed.all_reduce_min(self.first_bad.clone()))
        return step if step < NEVER else None

    def averages(self) -> dict[str, float]:
        """Mean loss and accuracies in percent, over all processes."""
        return _averages(distributed.all_reduce_sum(self.sums.clone()))

    def counts(self) -> dict[str, int]:
        """``clamped_logits`` and ``skipped_steps``, over all processes."""
        totals = distributed.all_reduce_sum(self.sums.clone()).tolist()
        return {name: int(total) for name, total in zip(SUMS[4:], totals[4:], strict=True)}

    def last_step(self) -> dict[str, float]:
        """Loss and accuracies of this process's last micro-batch."""
        return _averages(self.last)


def check_weights(model: nn.Module, epoch: int) -> None:
    """Raise :class:`DivergenceError` for a weight that is not finite: the last step's update is in no loss yet."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise DivergenceError(f"epoch {epoch}, last step: a weight is not finite; {ADVICE}")


def _averages(sums: Tensor) -> dict[str, float]:
    loss, hits1, hits5, samples = sums[:4].tolist()
    samples = max(samples, 1)
    return {"loss": loss / samples, "top1": 100 * hits1 / samples, "top5": 100 * hits5 / samples}
