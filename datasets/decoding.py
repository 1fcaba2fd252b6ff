"""From an image file to RGB pixels: PIL as in the reference, or a faster decoder for the plain case."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torchvision
from PIL import Image, UnidentifiedImageError

from datasets.source import DataError

UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # what PIL raises


def open_rgb(path: str, decoder: str = "pil") -> Image.Image:
    """The image as RGB, whatever it is stored as; an EXIF orientation is not applied, as in the reference.

    ``decoder``: "pil", or "fast" for TorchCodec (else torchvision) on JPEG files that need no conversion; on these both
    use libjpeg-turbo with the same settings. Raises :class:`DataError` that names the file.
    """
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if decoder == "fast" and _is_plain(image):
                return _decode_fast(content)
            return image.convert("RGB")
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


def _decode_fast(content: bytes) -> Image.Image:
    pixels = _provider()[1](content)  # uint8 [3, H, W]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@cache
def _provider() -> tuple[str, Callable[[bytes], torch.Tensor]]:
    """Chosen once: TorchCodec decodes images since 0.16, and torchvision's decoders go away."""
    try:
        from torchcodec.decoders import decode_image
    except (ImportError, OSError, RuntimeError):  # absent, too old, or its libraries do not load
        return "torchvision", _decode_torchvision
    return "torchcodec", decode_image


def _decode_torchvision(content: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)
