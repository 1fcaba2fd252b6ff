"""The operations of torchvision's augmentation policies for batches, each image with its own strength.

Each maps ``images`` uint8 [B, 3, H, W] and ``strength`` float64 [B] to images of the same shape, and equals, image by
image, what :class:`torchvision.transforms.AutoAugment` does to a tensor with that strength. None of them waits for the
device, so that a CUDA graph can capture them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Geometry: where each pixel comes from


def _warp(images: Tensor, *matrix: Tensor | float) -> Tensor:
    """The pixel at (x, y), from the centre, becomes the nearest one at (a x + b y + c, d x + e y + f), black outside.

    ``matrix``: a to f, numbers or float64 [B].
    """
    count, _, height, width = images.shape
    rows = [m if isinstance(m, Tensor) else images.new_full((count,), m, dtype=torch.float64) for m in matrix]
    a, b, c, d, e, f = torch.stack(rows).float()[:, :, None, None]
    x = torch.linspace(0.5 - width / 2, width / 2 - 0.5, width, device=images.device)
    y = torch.linspace(0.5 - height / 2, height / 2 - 0.5, height, device=images.device)[:, None]
    # No matrix product: it would be rounded to TF32 or half precision where those are on.
    across, down = x * (a / (width / 2)) + y * (b / (width / 2)), x * (d / (height / 2)) + y * (e / (height / 2))
    grid = torch.stack([across + c / (width / 2), down + f / (height / 2)], dim=-1)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def shear_x(images: Tensor, strength: Tensor) -> Tensor:
    return _warp(images, 1, strength, strength * images.shape[2] / 2, 0, 1, 0)


def shear_y(images: Tensor, strength: Tensor) -> Tensor:
    return _warp(images, 1, 0, 0, strength, 1, strength * images.shape[3] / 2)


def translate_x(images: Tensor, strength: Tensor) -> Tensor:
    return _warp(images, 1, 0, -strength.trunc(), 0, 1, 0)


def translate_y(images: Tensor, strength: Tensor) -> Tensor:
    return _warp(images, 1, 0, 0, 0, 1, -strength.trunc())


def rotate(images: Tensor, strength: Tensor) -> Tensor:
    """``strength`` in degrees, counter-clockwise."""
    angle = strength.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    return _warp(images, cos, -sin, 0, sin, cos, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Colours


def _blend(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """``images`` at strength 0, ``other`` at -1."""
    factor = (1 + strength)[:, None, None, None]
    return (factor.float() * images + (1 - factor).float() * other).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)[:, None]


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images[:, :1]), strength)


def colour(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, _grey(images), strength)


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, _grey(images).float().mean(dim=(1, 2, 3), keepdim=True), strength)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Against the image smoothed by a 3 x 3 filter of ones with 5 in the middle; the border stays as it is."""
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = (total / 13).round_()
    return _blend(images, smooth, strength)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep the upper ``strength`` bits."""
    dropped = (8 - strength.trunc()).clamp(0, 8).to(torch.int32)[:, None, None, None]
    return ((images.to(torch.int32) >> dropped) << dropped).to(torch.uint8)


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert what is at least ``strength``."""
    return torch.where(images >= strength.float()[:, None, None, None], 255 - images, images)


def invert(images: Tensor, strength: Tensor) -> Tensor:
    return 255 - images


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 255; one of a single value stays."""
    low = images.amin(dim=(2, 3), keepdim=True).float()
    scale = 255 / (images.amax(dim=(2, 3), keepdim=True).float() - low)
    flat = ~scale.isfinite()
    low, scale = low.masked_fill(flat, 0), scale.masked_fill(flat, 1)
    return ((images - low) * scale).clamp_(0, 255).to(torch.uint8)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Spread each channel's histogram evenly."""
    channels = images.flatten(2).flatten(0, 1).long()  # [B * 3, H * W]
    histogram = channels.new_zeros(len(channels), 256).scatter_add_(1, channels, torch.ones_like(channels))
    brightest = histogram.gather(1, channels.amax(dim=1, keepdim=True))
    step = (channels.shape[1] - brightest) // 255
    below = histogram.cumsum(dim=1) - histogram
    levels = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    levels[:, 0] = 0
    spread = torch.where(step == 0, channels, levels.gather(1, channels))
    return spread.to(torch.uint8).reshape(images.shape)


# torchvision's names; a place in the list is an operation's number, 0 changes nothing.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "Identity": None,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "Brightness": brightness,
    "Color": colour,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}
NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}


def apply(images: Tensor, numbers: Tensor, strength: Tensor) -> Tensor:
    """Apply to each image the operation that ``numbers`` int64 [B] names, with ``strength`` float64 [B]."""
    return (_by_operation if images.device.type == "cpu" else _everywhere)(images, numbers, strength)


def _by_operation(images: Tensor, numbers: Tensor, strength: Tensor) -> Tensor:
    """Compute each operation for its own images."""
    for number, operation in enumerate(OPERATIONS.values()):
        rows = (numbers == number).nonzero()[:, 0]
        if operation and len(rows):
            images = images.index_copy(0, rows, operation(images[rows], strength[rows]))
    return images


def _everywhere(images: Tensor, numbers: Tensor, strength: Tensor) -> Tensor:
    """Compute each operation for all images: which ones are its own would have to be asked of the device."""
    chosen = images
    for number, operation in enumerate(OPERATIONS.values()):
        if operation:
            chosen = torch.where((numbers == number)[:, None, None, None], operation(images, strength), chosen)
    return chosen
