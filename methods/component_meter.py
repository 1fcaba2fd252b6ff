"""Average attraction and repulsion over the batches of an epoch.

Legend: C classes, K chosen rows of the classifier, W processes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from methods.gradients import Components
from utils import distributed
from utils.errors import InputError

TABLE_CLASSES = 1000  # at most, for the table [C, C] of the last epoch


def chosen_rows(class_counts: Tensor, wanted: Sequence[int] | None = None) -> list[int]:
    """Classifier rows to record in full: ``wanted``, else the rarest, the median and the most frequent class.

    ``class_counts`` int64 [C]; of equally frequent classes the last one counts as the rarest, and classes without
    images do not count. Raises :class:`InputError` for rows that do not exist.
    """
    if wanted is None:
        order = torch.argsort(class_counts, descending=True, stable=True)[: int((class_counts > 0).sum())].tolist()
        return list(dict.fromkeys([order[-1], order[len(order) // 2], order[0]]))
    wrong = [row for row in wanted if row >= len(class_counts)]
    if wrong:
        raise InputError(f"diagnostics_rows: {wrong[0]}, but the classes are 0 to {len(class_counts) - 1}")
    return list(dict.fromkeys(wanted))


class ComponentMeter:
    """Means of :class:`Components` over batches, where a batch is one pass of one process.

    The sums stay on the device, in one flat tensor, which checkpoints within an epoch save.
    """

    def __init__(self, num_classes: int, rows: Sequence[int], last_epoch: int, device: torch.device):
        """``rows``: see :func:`chosen_rows`; the table [C, C] is summed only in ``last_epoch``."""
        self.num_classes, self.chosen, self.last_epoch = num_classes, list(rows), last_epoch
        self._rows = torch.tensor(self.chosen, dtype=torch.int64, device=device)
        self.device = device
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Set all sums to zero; to be called before every epoch."""
        self._reset(epoch == self.last_epoch and self.num_classes <= TABLE_CLASSES)

    def _reset(self, with_table: bool) -> None:
        c = self.num_classes
        per_class = ("diagonal", "row_sums", "column_sums", "attraction_mass", "repulsion_mass", "cosines", "defined")
        shapes = {"batches": (), **dict.fromkeys(per_class, (c,)), "row_norms": (c, len(self.chosen))}
        if with_table:
            shapes["table"] = (c, c)
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        parts = self.flat.split(sizes)
        self.sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    @torch.no_grad()
    def update(self, parts: Components) -> None:
        """Add one batch."""
        sums, labels, first = self.sums, parts.labels, parts.first[:, None]
        norms = parts.norms * first  # every class once
        sums["batches"] += 1
        sums["diagonal"].index_add_(0, labels, norms.gather(1, labels[:, None]).squeeze(1))
        sums["row_sums"] += norms.sum(dim=0)
        sums["column_sums"].index_add_(0, labels, norms.sum(dim=1))
        sums["attraction_mass"] += parts.attraction_mass
        sums["repulsion_mass"] += parts.repulsion_mass
        sums["cosines"] += parts.repulsion_cosine.nan_to_num()
        sums["defined"] += ~parts.repulsion_cosine.isnan()
        sums["row_norms"].index_add_(0, labels, norms[:, self._rows])
        if "table" in sums:
            sums["table"].index_add_(0, labels, norms)

    def rows(self) -> Tensor:
        """The chosen rows and the sums of every process, float64 [W, ...] on the CPU, for :meth:`load_rows`."""
        return distributed.gather_rows(torch.cat([self._rows, self.flat])[None]).cpu()

    def load_rows(self, rows: Tensor | None) -> bool:
        """Restore the :meth:`rows` of an interrupted epoch; return False, changing nothing, if other rows were chosen.

        The table is summed further only if both have one, since the number of epochs may have changed.
        """
        count = len(self.chosen)
        table = self.num_classes**2 * ("table" in self.sums)
        whole = len(self.flat) - table
        if rows is None or rows.shape[1] - count not in (whole, whole + self.num_classes**2):
            return False
        if not torch.equal(rows[:, :count], self._rows.cpu().to(rows.dtype).expand(len(rows), -1)):
            return False
        mine, others = distributed.rank(), distributed.world_size() != len(rows)
        row = (rows.sum(dim=0) * (mine == 0) if others else rows[mine])[count:]
        if table and len(row) == whole:
            self._reset(with_table=False)
        self.flat.copy_(row[: len(self.flat)])
        return True

    def averages(self) -> dict[str, np.ndarray]:
        """Means over the batches of all processes, float32: ``row_norms`` [K, C], ``table`` [C, C], all others [C].

        ``batches`` is their number. ``repulsion_cosine`` is NaN for rows that fewer than two
        classes repelled in every batch.
        """
        total = distributed.all_reduce_sum(self.flat.clone())
        sums = dict(zip(self.sums, total.split([t.numel() for t in self.sums.values()]), strict=True))
        batches, cosines, defined = (sums.pop(name) for name in ("batches", "cosines", "defined"))
        means = {name: (part / batches.clamp(min=1)).view_as(self.sums[name]) for name, part in sums.items()}
        means["repulsion_cosine"] = cosines / defined  # 0 / 0 is NaN
        arrays = {name: mean.mT if mean.dim() == 2 else mean for name, mean in means.items()}
        return {"batches": np.int64(batches.item()), **{k: a.float().cpu().numpy() for k, a in arrays.items()}}
