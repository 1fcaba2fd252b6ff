"""A picture of what the network sees: training images of three classes, augmented and, if it is on, after mixup."""

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
from methods.mixup import mix
from utils import command_line
from utils.build import DATA_OPTIONS, new_method
from utils.errors import InputError
from utils.files import atomic_file
from utils.report import style
from utils.report.figure_data import by_frequency

IMAGES = 8  # per class
EPOCH = 0
ENDINGS = (".png", ".pdf")


class Row(NamedTuple):
    """A class, and its first images in the order of the epoch."""

    name: str
    count: int  # training images, after the cut
    images: Tensor  # float32 [n, S, S, 3] in 0 .. 1, n <= IMAGES
    weights: Tensor  # float32 [n], of the class's own image in the mixture; 1 without mixup


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
    mixup = f", after mixup (alpha {cfg.alpha:g}); above each, the weight of the class's own image" if cfg.mixup else ""
    title = f"{cfg.dataset}, epoch {EPOCH}, seed {cfg.seed}{mixup}"
    figure = preview_figure(preview_rows(cfg), title, mixed=cfg.mixup)
    try:
        with atomic_file(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # class names in scripts that the font lacks
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=style.DPI)
    except OSError as error:
        raise InputError(f"--preview: {path} cannot be written: {error.strerror}") from None


def preview_rows(cfg: CfgNode) -> list[Row]:
    """The most frequent class, the middle one and the least frequent one, as one process trains on them.

    Only the images that are shown, and their partners in mixup, are decoded.
    """
    options = {key: cfg[key] for key in DATA_OPTIONS} | {"data_on_device": False}
    data = build_data(class_map=cfg.class_map, **options)
    loader = data.train_loader(cfg.batch_size, cfg.seed, CPU, accumulate=cfg.accumulate)
    order = loader.order(EPOCH)
    draws = new_method(cfg, data).draws(loader.batch_sizes, cfg.seed, EPOCH, loader.accumulate)
    parts = [
        (order[micro.positions][draw.partner], draw.lam.expand(len(draw.partner)))
        for micro, draw in zip(loader.micro_batches, draws, strict=True)
    ]
    # In the epoch's order, [N] and then what fills up the empty micro-batches of its last step.
    partners, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    mean, std = (torch.tensor(values) for values in (data.spec.mean, data.spec.std))
    ranked = [label for label in by_frequency(data.class_counts) if data.class_counts[label] > 0]
    rows = []
    for label in dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1])):
        places = (loader.targets[order] == label).nonzero()[:IMAGES, 0]
        own, size = weights[places], len(places)
        pairs = torch.cat([order[places], partners[places]])
        (inputs,) = loader.pixels.train_inputs(pairs, [slice(0, 2 * size)], cfg.seed, EPOCH)
        swapped = torch.arange(2 * size).roll(size)
        mixed, *_ = mix(loader.pixels.augment(*inputs), pairs, own.repeat(2)[:, None, None, None], swapped)
        images = (mixed[:size].permute(0, 2, 3, 1) * std + mean).clamp(0, 1)
        rows.append(Row(data.class_names[label], int(data.class_counts[label]), images, own))
    return rows


@style.styled(**{"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False})
def preview_figure(rows: list[Row], title: str, mixed: bool = False) -> Figure:
    """Draw a line of images per class; with mixup, the weight of its own image above each."""
    figure = Figure(figsize=(style.WIDE, 0.4 + 1.4 * len(rows)), layout="constrained")
    figure.suptitle(style.plain(title), fontsize=10)
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
