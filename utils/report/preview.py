"""A picture of what the network sees: training images of three classes, augmented and mixed as the options say."""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from yacs.config import CfgNode

from datasets import build_data
from datasets.data import CPU
from utils import command_line
from utils.build import DATA_OPTIONS, mix_kind, new_method, train_loader
from utils.errors import InputError
from utils.files import atomic_file
from utils.report import style
from utils.report.figure_data import by_frequency
from utils.run.describe import describe_mixing

IMAGES = 8  # per class
ENDINGS = (".png", ".pdf")


class Row(NamedTuple):
    """A class, and its first images in the order of the epoch."""

    name: str
    count: int  # training images, after the cut
    images: Tensor  # float32 [n, S, S, 3] in 0 .. 1, n <= IMAGES
    weights: Tensor  # float32 [n], of the class's own image in the mixture; 1 if it is not mixed


def picture_file(text: str) -> Path:
    """An argparse type: a file that a picture can be written to."""
    path = command_line.path(text)
    if path.suffix.lower() not in ENDINGS or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file that ends with {' or '.join(ENDINGS)}, not {text!r}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be written to: {error.strerror}") from None


def write_preview(cfg: CfgNode, path: Path) -> None:
    """Draw the preview of a configuration. Raises :class:`InputError`."""
    mixing = describe_mixing(cfg) if mix_kind(cfg) else ""
    after = f", after {mixing}; above each, the weight of the class's own image" if mixing else ""
    title = f"{cfg.dataset}, epoch {shown_epoch(cfg)}, seed {cfg.seed}{after}"
    figure = preview_figure(preview_rows(cfg), title, mixed=bool(mixing))
    try:
        with atomic_file(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # class names in scripts that the font lacks
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=style.DPI)
    except OSError as error:
        raise InputError(f"--preview: {path} cannot be written: {error.strerror}") from None


def shown_epoch(cfg: CfgNode) -> int:
    """The first one in which everything is on."""
    return cfg.cmo_idle if cfg.mix == "cmo" else 0


def preview_rows(cfg: CfgNode) -> list[Row]:
    """The most frequent class, the middle one and the least frequent one, as one process trains on them.

    Only the images that are shown, and those that are mixed into them, are decoded.
    """
    options, epoch = {key: cfg[key] for key in DATA_OPTIONS} | {"data_on_device": False}, shown_epoch(cfg)
    data = build_data(class_map=cfg.class_map, **options)
    loader, method = train_loader(cfg, data, CPU), new_method(cfg, data)
    method.start_epoch(epoch)
    draws = method.draws(loader.batch_sizes, cfg.seed, epoch, loader.accumulate)
    order, ranked = loader.order(epoch), by_frequency(data.class_counts)
    ranked = [label for label in ranked if data.class_counts[label] > 0]
    mean, std = (torch.tensor(values) for values in (data.spec.mean, data.spec.std))
    # In the epoch's order, [N] and then what fills up the empty micro-batches of its last step.
    steps = [draw for draw in draws for _ in draw.partner]
    partners = torch.cat(
        [
            order[micro.positions][draw.partner % len(draw.partner)]
            for micro, draw in zip(loader.micro_batches, draws, strict=True)
        ]
    )
    rows = []
    for label in dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1])):
        places = (loader.targets[order] == label).nonzero()[:IMAGES, 0]
        own, size = order[places], len(places)
        others = loader.pasted(epoch)[own] if method.pastes else partners[places]
        drawn = torch.cat([own, own + len(order) if method.pastes else others])
        (inputs,) = loader.pixels.train_inputs(torch.cat([own, others]), [slice(0, 2 * size)], cfg.seed, epoch, drawn)
        images, shown = loader.pixels.augment(*inputs), [steps[place] for place in places]
        if method.mixes:
            pairs = [
                method.mixing.mix(images[n::size], torch.zeros(2), *draw._replace(partner=torch.tensor([1])))
                for n, draw in enumerate(shown)
            ]
            images = torch.cat([mixed[:1] for mixed, *_ in pairs])
        images = (images[:size].permute(0, 2, 3, 1) * std + mean).clamp(0, 1)
        weights = torch.stack([draw.lam for draw in shown])
        rows.append(Row(data.class_names[label], int(data.class_counts[label]), images, weights))
    return rows


@style.styled(**{"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False})
def preview_figure(rows: list[Row], title: str, mixed: bool = False) -> Figure:
    """Draw a line of images per class; with mixup, the weight of its own image above each."""
    figure = Figure(figsize=(style.WIDE, 0.4 + 1.4 * len(rows)), layout="constrained")
    figure.suptitle(style.wrapped(title, 100), fontsize=10)
    for axes, row in zip(figure.subplots(len(rows), IMAGES, squeeze=False), rows, strict=True):
        label = f"{style.wrapped(row.name, 20)}\n{row.count:,} image{'s' * (row.count != 1)}"
        axes[0].set_ylabel(label, rotation="horizontal", ha="right", va="center")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        for axis, image, weight in zip(axes, row.images, row.weights, strict=False):
            axis.imshow(image.numpy(), interpolation="nearest")
            if mixed:
                axis.set_title(f"{weight:.2f}", fontsize=style.SMALL)
    return figure
