"""Decode image files to RGB: with PIL as in the reference, or faster for plain JPEG files."""

import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datasets.source import DataError

# Whatever a file is called. PIL knows forty more; EPS is a program that it would have Ghostscript run.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MOST_BYTES = 2**30  # of a file
MOST_ELONGATED = 1000  # long side over short side; scaling the short side up takes that many times the memory
KINDS = {  # of images that are converted, by mode
    "1": "in grayscale",
    "L": "in grayscale",
    "P": "with a palette",
    "CMYK": "in CMYK",
    "I": "with 16 bits (reduced to 8)",  # 32 bits are refused
    "F": "of floats (multiplied by 255)",
}
TRANSPARENT = "with transparency (dropped)"
LOOKED_AT = 100  # images per split

# PIL also logs and warns about damaged files, without the file's name.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_rgb(path: str, decoder: str = "pil") -> Image.Image | Tensor:
    """Open an image and convert it to RGB; an EXIF orientation is not applied, as in the reference.

    ``decoder``: "pil", or "fast": TorchCodec (else torchvision) decodes JPEG files that need no conversion to a tensor,
    uint8 [3, H, W]. The pixels are the same, since all use libjpeg-turbo with the same settings; crops of a tensor
    differ a little (see :mod:`datasets.augment`). Of 16 bits the upper 8 are kept; float images in 0 .. 1 are scaled by
    255. Raises :class:`DataError` that names the file.
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
            return image if image.mode == "RGB" else _to_rgb(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: is no readable image (none of {', '.join(FORMATS)})") from None
    except Exception as error:  # PIL and the decoders raise many types on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: is no readable image ({reason})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """As PIL converts it, but for the modes whose values PIL would clip at 255."""
    if _has_16_bits(image):  # as PIL reduces 16-bit RGB
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("32-bit or signed integers, whose range is not known; save it with 8 or 16 bits")
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
            raise ValueError(
                f"float values from {values.min():g} to {values.max():g}; only 0 .. 1 has a known scale, "
                "save it with 8 or 16 bits"
            )
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    return image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    """Whether values fill 0 .. 65535. Mode "I" has 32 bits, but PGM files are scaled, and Pillow 9 so opens PNG."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def conversion_notes(split: str, total: int, path: Callable[[int], str]) -> list[str]:
    """Say what :func:`open_rgb` converts among 100 evenly spaced images, from their headers; for the run's log.

    ``path``: of each of the ``total`` images of ``split``. Files that cannot be read are left to :func:`open_rgb`.
    """
    looked_at = range(0, total, 1 + total // LOOKED_AT)
    kinds = Counter(filter(None, (_kind(path(index)) for index in looked_at)))
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return [f"{split}: of {len(looked_at)} images looked at: {found}; all become 8-bit RGB"] if found else []


def _kind(path: str) -> str:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                return TRANSPARENT
            return KINDS.get(image.mode.partition(";")[0], "")
    except Exception:  # see open_rgb
        return ""


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
