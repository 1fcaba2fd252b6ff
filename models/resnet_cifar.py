"""The CIFAR ResNets of He et al. (CVPR 2016, section 4.2): three stages of n blocks at 16, 32 and 64 channels.

Shapes: images [B, 3, H, W] -> features [B, 64 w]. Depth is 6 n + 2, counting the classifier; a network of width w has
w times the channels throughout, as a fixed simplex of 100 classes needs (w = 2).
"""

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (8, 20, 32, 44, 56, 110)


class PadShortcut(nn.Module):
    """Option A, without parameters: every second pixel, and half of the new channels as zeros on either side."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.padding = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet without its classifier; convolutions start He normal, as in the reference."""

    def __init__(self, blocks_per_stage: int, width: int = 1):
        super().__init__()
        narrow, middle, wide = 16 * width, 32 * width, 64 * width
        self.out_features = wide
        self.conv1 = nn.Conv2d(3, narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.layer1 = _stage(narrow, narrow, blocks_per_stage, stride=1)
        self.layer2 = _stage(narrow, middle, blocks_per_stage, stride=2)
        self.layer3 = _stage(middle, wide, blocks_per_stage, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, 64 w, H / 4, W / 4]
        return x.mean(dim=(2, 3))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


def build(depth: int, width: int = 1) -> CifarResNet:
    """Build the network of a depth in ``DEPTHS``, ``width`` times as wide as He et al.'s."""
    return CifarResNet((depth - 2) // 6, width)
