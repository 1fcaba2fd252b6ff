"""Decode image files to RGB: with PIL as in the reference, or faster for plain JPEG files."""

import io
import logging
import os
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.source import DataError

# Whatever a file is called. PIL knows forty more; EPS is a program that it would have Ghostscript run.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MOST_BYTES = 2**30  # of a file
MOST_ELONGATED = 1000  # long side over short side; scaling the short side up takes that many times the memory

# PIL also logs and warns about damaged files, without the file's name.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_rgb(path: str, decoder: str = "pil") -> Image.Image | Tensor:
    """Open an image and convert it to RGB; an EXIF orientation is not applied, as in the reference.

    ``decoder``: "pil", or "fast": TorchCodec (else torchvision) decodes JPEG files that need no conversion to a tensor,
    uint8 [3, H, W]. The pixels are the same, since all use libjpeg-turbo with the same settings; crops of a tensor
    differ a little (see :mod:`datasets.augment`). Raises :class:`DataError` that names the file.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise ValueError(f"a file of more than {MOST_BYTES / 2**30:g} GiB")
            content = file.read()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if max(image.size) > MOST_ELONGATED * min(image.size):
                raise ValueError(f"{image.width}x{image.height} pixels, too long and thin to be scaled")
            if decoder == "fast" and _is_plain(image):
                return fast_provider()[1](torch.frombuffer(bytearray(content), dtype=torch.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: is no readable image (none of {', '.join(FORMATS)})") from None
    except Exception as error:  # PIL and the decoders raise many types on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: is no readable image ({reason})") from None


def fast_decoder() -> str:
    """The package behind ``decoder: fast``."""
    return fast_provider()[0]


def _is_plain(image: Image.Image) -> bool:
    """Whether all decoders agree: JPEG, no CMYK, no EXIF (TorchCodec applies rotations, even ones PIL misses)."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and "APP1" not in image.app


@cache
def fast_provider() -> tuple[str, Callable[[Tensor], Tensor]]:
    """TorchCodec decodes images since 0.16; torchvision's decoders are deprecated."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # absent, too old, or its libraries do not load
        return "torchvision", partial(torchvision.io.decode_jpeg, mode=torchvision.io.ImageReadMode.RGB)
    return "torchcodec", decode_jpeg
