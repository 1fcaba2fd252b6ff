"""What is compared: the usual loop, this trainer in its modes, the bare step, and the losses alone."""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from yacs.config import CfgNode

from datasets import Data, Images, find_spec
from datasets.long_tail import long_tail_counts
from methods import build_method
from models import build_model
from utils import build, distributed
from utils.bench.timing import Run
from utils.config import read_config
from utils.cuda_graph import capture_cuda_graph
from utils.option_types import PRECISIONS
from utils.precision import autocast, matmul_precision, new_scaler
from utils.step import compile_model

ROOT = Path(__file__).resolve().parents[2]
CIFAR = str(ROOT / "config/cifar10/cifar10_imb001_arbloss_mixup.yaml")
IMAGENET = str(ROOT / "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml")
MODES = [precision + way for way in ("", "+compile") for precision in PRECISIONS]
BATCH, CRITERION_BATCH = 128, 256  # images; the first is the CIFAR configuration's


def options_of(mode: str) -> list[str]:
    """Overrides of the configuration: ``bf16+compile`` -> precision bf16 compile True."""
    precision, plus, _ = mode.partition("+")
    return ["precision", precision, "compile", str(bool(plus))]


def published_arb(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """ARB-Loss as published, mean over the batch: ``logits [B, C]``, ``targets [B]``, ``counts [C]``."""
    powers = logits.clamp(-30, 30).exp()
    weights = counts / counts[targets][:, None].repeat(1, logits.shape[1])  # [B, C], n_k / n_y
    own = powers.gather(1, targets[:, None]).squeeze(1)
    return -(own / (powers * weights).sum(dim=1)).log().mean()


class PILImages(Dataset):
    """In-memory images, converted one by one through PIL as torchvision's CIFAR-10 does."""

    def __init__(self, part: Images, *transform: Callable):
        self.images, self.targets = part.images.numpy(), part.targets.tolist()
        self.transform = transforms.Compose(transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


class Classic:
    """The usual loop: a DataLoader over PIL images, eager float32, the default layout, ``.item()`` at every step."""

    def __init__(self, data: Data, device: torch.device, cfg: CfgNode | None = None):
        """``cfg``: by default the CIFAR configuration, with as many workers as are of use."""
        on_cuda = device.type == "cuda"
        self.cfg = cfg or read_config(CIFAR, ["workers", str(8 if on_cuda else sys.maxsize)])[0]
        self.device, self.classes = device, data.num_classes
        self.model = build_model(self.cfg.dataset, self.cfg.backbone, data.num_classes).to(device)
        options = {"momentum": self.cfg.momentum, "weight_decay": self.cfg.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), self.cfg.lr, **options)
        self.workers = distributed.workers_here(self.cfg.workers)
        kept = {"num_workers": self.workers, "persistent_workers": self.workers > 0, "pin_memory": on_cuda}
        loader = partial(DataLoader, batch_size=self.cfg.batch_size, **kept)
        flips = (transforms.RandomHorizontalFlip(),) if data.spec.flip else ()
        augmentation = (transforms.RandomCrop(data.image_size, padding=4), *flips)
        conversion = (transforms.ToTensor(), transforms.Normalize(data.spec.mean, data.spec.std))
        self.train_loader = loader(PILImages(data.train, *augmentation, *conversion), shuffle=True)
        self.test_loader = loader(PILImages(data.test, *conversion))

    def train(self, epoch: int = 0) -> float:
        """One epoch with mixup and ARB-Loss of batch counts; returns its mean loss."""
        build.set_lr(self.optimizer, self.cfg, epoch)
        self.model.train()
        loss_sum, hits = 0.0, 0
        for images, targets in self.train_loader:
            images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
            lam = np.random.beta(self.cfg.alpha, self.cfg.alpha)
            partner = torch.randperm(len(images), device=self.device)
            logits = self.model(lam * images + (1 - lam) * images[partner])
            counts = F.one_hot(targets, self.classes).sum(dim=0).float()  # bincount would wait for the device
            loss = lam * published_arb(logits, targets, counts)
            loss = loss + (1 - lam) * published_arb(logits, targets[partner], counts)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item() * len(images)
            hits += (logits.argmax(dim=1) == targets).sum().item()
        return loss_sum / len(self.train_loader.dataset)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The most probable class of every test image, int64 [N] on the CPU."""
        self.model.eval()
        found = []
        for images, _ in self.test_loader:
            logits = self.model(images.to(self.device, non_blocking=True))
            found.append(logits.argmax(dim=1).cpu())
        return torch.cat(found)


class Trainer:
    """This trainer's own pieces, without log, checkpoints and signals."""

    def __init__(self, data: Data, mode: str, device: torch.device, *options: str, config: str | None = None):
        """``config``: a YAML file, by default the CIFAR configuration; ``options`` override it."""
        cfg, _ = read_config(config or CIFAR, [*options_of(mode), *options])
        self.precision, self.epoch = cfg.precision, 0
        self.loader = build.train_loader(cfg, data, device)
        model = build.new_model(cfg, data).to(device)
        method = build.new_method(cfg, data).to(device)
        optimizer = build.new_optimizer(cfg, model, method)
        scaler, parallel = new_scaler(cfg.precision, device), build.new_parallel(cfg, model, device)
        self.step = build.new_step(cfg, build.Training(model, method, optimizer, scaler, parallel, device))
        build.set_lr(optimizer, cfg, 0)

    def train(self, steps: int | None = None) -> None:
        """An epoch, or its first steps."""
        self.epoch += 1
        with matmul_precision(self.precision):
            self.step.start_epoch(self.epoch)
            draws = self.step.method.draws(self.loader.batch_sizes, 0, self.epoch, device=self.loader.device)
            batches = self.loader.epoch(self.epoch, paste=self.step.method.pastes)
            for batch, draw in itertools.islice(zip(batches, draws, strict=True), steps):
                self.step(batch, draw)
            self.step.meter.averages()


class Bound:
    """Upper bound of the speed: forward, cross-entropy, backward and optimizer of the bare model on one batch."""

    def __init__(self, data: Data, mode: str, device: torch.device):
        cfg, _ = read_config(CIFAR, options_of(mode))
        self.precision, self.device = cfg.precision, device
        model = build_model(cfg.dataset, cfg.backbone, data.num_classes)
        self.model = model.to(device, memory_format=torch.channels_last)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.01, cfg.momentum, weight_decay=cfg.weight_decay, fused=True)
        self.images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self.targets = torch.arange(BATCH, device=device) % data.num_classes
        if cfg.compile:
            compile_model(self.model, device)
        self.step: Run = self._step
        if device.type == "cuda":
            with matmul_precision(self.precision):
                self.step = capture_cuda_graph(self._step)

    def _step(self) -> None:
        with autocast(self.precision, self.device):
            logits = self.model(self.images)
        F.cross_entropy(logits, self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: int) -> None:
        with matmul_precision(self.precision):
            for _ in range(steps):
                self.step()


def losses(classes: int, device: torch.device) -> dict[str, Run]:
    """Forward and backward of each criterion on random logits [256, C]."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor(long_tail_counts(1280, classes, "exp", 0.004), device=device)
    logits = torch.randn(CRITERION_BATCH, classes, generator=draw).to(device).requires_grad_()
    targets = torch.randint(classes, (2, CRITERION_BATCH), generator=draw).to(device)
    lam, log_counts, float_counts = torch.tensor(0.3, device=device), counts.log(), counts.float()
    method = build_method("arb", "global", counts, mixup_alpha=1.0).to(device)

    def ours() -> Tensor:
        own, other = method.criterion(logits, counts)(torch.stack(list(targets))).mean(dim=1)
        return lam * own + (1 - lam) * other

    def mixed(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return lam * loss(targets[0]) + (1 - lam) * loss(targets[1])

    def run(loss: Run) -> None:
        loss().backward()
        logits.grad = None

    criteria: dict[str, Run] = {
        "plain, one target": lambda: F.cross_entropy(logits, targets[0]),
        "plain": lambda: mixed(partial(F.cross_entropy, logits)),
        "clamp, add, plain": lambda: mixed(partial(F.cross_entropy, logits.clamp(-30, 30) + log_counts)),
        "published": lambda: mixed(lambda labels: published_arb(logits, labels, float_counts)),
        "ours": ours,
    }
    return {name: partial(run, loss) for name, loss in criteria.items()}


def noise(train: int, test: int, dataset: str = "cifar10", side: int = 32, classes: int = 10) -> Data:
    """Random images of ``side`` x ``side`` pixels in memory; speed does not depend on the content."""
    draw = np.random.default_rng(0)
    pixels = (draw.integers(0, 256, (size, side, side, 3), dtype=np.uint8) for size in (train, test))
    train, test = (Images(torch.from_numpy(images), torch.arange(len(images)) % classes) for images in pixels)
    names, counts = [str(label) for label in range(classes)], torch.bincount(train.targets, minlength=classes)
    return Data(find_spec(dataset), names, counts, train, None, test, image_size=side)
