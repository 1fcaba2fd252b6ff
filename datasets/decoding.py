"""From an image file to RGB pixels: PIL as in the reference, or a faster decoder for the plain case."""

import io
from collections.abc import Callable
from functools import cache, partial

import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.source import DataError

UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # what PIL raises


def open_rgb(path: str, decoder: str = "pil") -> Image.Image | Tensor:
    """The image as RGB, whatever it is stored as; an EXIF orientation is not applied, as in the reference.

    ``decoder``: "pil", or "fast": TorchCodec (else torchvision) turns JPEG files that need no conversion into a tensor,
    uint8 [3, H, W]. The pixels are the same, since all use libjpeg-turbo with the same settings; crops of a tensor
    differ a little (see :mod:`datasets.augment`). Raises :class:`DataError` that names the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as image:
            if decoder == "fast" and _is_plain(image):
                return _provider()[1](torch.frombuffer(bytearray(content), dtype=torch.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: is no readable image (of no format that PIL knows)") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: is no readable image ({' '.join(str(error).split())})") from None


def fast_decoder() -> str:
    """The package that decodes where the fast decoder is asked for."""
    return _provider()[0]


def _is_plain(image: Image.Image) -> bool:
    """A JPEG that every decoder reads alike: no CMYK, no EXIF (TorchCodec applies rotations, also ones PIL misses)."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and "APP1" not in image.app


@cache
def _provider() -> tuple[str, Callable[[Tensor], Tensor]]:
    """Chosen once: TorchCodec decodes images since 0.16, and torchvision's decoders go away."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # absent, too old, or its libraries do not load
        return "torchvision", partial(torchvision.io.decode_jpeg, mode=torchvision.io.ImageReadMode.RGB)
    return "torchcodec", decode_jpeg
