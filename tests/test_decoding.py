"""Decoded images against PIL's own conversion, with every decoder; 16 bits and floats; files that are not images."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from datasets import build_data, decoding
from datasets.data import CPU
from datasets.decoding import conversion_notes, fast_decoder, open_rgb
from datasets.source import DataError
from datasets.specs import SPECS

ROOT = Path(__file__).parents[1]
PHOTOS = sorted((Path(__file__).parents[2] / "shared" / "data" / "photos").glob("*.JPEG"))
ORIENTATION = 0x0112  # the EXIF tag
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with", "ignore:Corrupt EXIF", "ignore:Truncated File")


def photo(width: int = 53, height: int = 37) -> Image.Image:
    """Smooth and colourful, no two parts alike."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


KINDS = {  # from file name to the mode it is stored in, the image and how to save it
    "colour.jpg": ("RGB", photo, {}),
    "colour.png": ("RGB", photo, {}),
    "colour.tif": ("RGB", photo, {}),
    "colour.bmp": ("RGB", photo, {}),
    "grey.jpg": ("L", lambda: photo().convert("L"), {}),
    "grey.png": ("L", lambda: photo().convert("L"), {}),
    "transparent grey.png": ("LA", lambda: photo().convert("LA"), {}),
    "print.jpg": ("CMYK", lambda: photo().convert("CMYK"), {}),
    "print.tif": ("CMYK", lambda: photo().convert("CMYK"), {}),
    "palette.png": ("P", lambda: photo().quantize(200), {}),
    "transparent palette.png": ("P", lambda: photo().quantize(200), {"transparency": 3}),
    "half transparent palette.png": ("P", lambda: photo().quantize(200), {"transparency": bytes(range(200))}),
    "one bit.png": ("1", lambda: photo().convert("1"), {}),
    "transparent.png": ("RGBA", lambda: Image.merge("RGBA", [*photo().split(), photo().convert("L")]), {}),
}


@pytest.fixture
def no_cached_decoder() -> Iterator[None]:
    """The fast decoder is chosen again in the test, and after it."""
    decoding.fast_provider.cache_clear()
    yield
    decoding.fast_provider.cache_clear()


@pytest.fixture(params=["pil", "torchvision", "torchcodec"])
def decoder(request, no_cached_decoder, monkeypatch) -> str:
    """Every way to decode, of those that are installed here."""
    if request.param == "pil":
        return "pil"
    if request.param == "torchvision":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # as if it were not installed
    else:
        pytest.importorskip("torchcodec.decoders")
    assert fast_decoder() == request.param
    return "fast"


def pixels(image: Image.Image | Tensor) -> np.ndarray:
    """uint8 [H, W, 3]"""
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).numpy()
    assert image.mode == "RGB"
    return np.asarray(image)


def assert_as_pil_converts_it(path: Path, decoder: str) -> None:
    ours = pixels(open_rgb(str(path), decoder))
    with Image.open(path) as image:
        expected = image.convert("RGB")
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, np.asarray(expected), err_msg=path.name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_comes_out_as_pil_converts_it(kind, decoder, tmp_path):
    mode, image, how = KINDS[kind]
    image().save(tmp_path / kind, **how)
    assert Image.open(tmp_path / kind).mode == mode
    assert_as_pil_converts_it(tmp_path / kind, decoder)


@pytest.mark.parametrize("orientation", [0, 3, 6, 9])
def test_an_exif_orientation_is_not_applied(orientation, decoder, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo().save(tmp_path / "rotated.jpg", exif=exif)
    assert pixels(open_rgb(str(tmp_path / "rotated.jpg"), decoder)).shape == (37, 53, 3)
    assert_as_pil_converts_it(tmp_path / "rotated.jpg", decoder)


def test_a_damaged_exif_orientation_is_not_applied_either(decoder, tmp_path):
    """A decoder may find a rotation where PIL finds no EXIF data."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = exif.tobytes()
    for place in range(len(whole)):
        damaged = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        for content in (damaged, whole[:place]):
            photo().save(tmp_path / "damaged.jpg", exif=content)
            assert_as_pil_converts_it(tmp_path / "damaged.jpg", decoder)


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"optimize": True, "restart_marker_rows": 1}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_plain_jpeg_files_are_equal_pixel_by_pixel(subsampling, how, decoder, tmp_path):
    for quality in (5, 90):
        for size in [(53, 37), (64, 64), (1, 1), (17, 300), (2, 3)]:
            photo(*size).save(tmp_path / "plain.jpg", quality=quality, subsampling=subsampling, **how)
            assert_as_pil_converts_it(tmp_path / "plain.jpg", decoder)


@pytest.mark.skipif(not PHOTOS, reason="no photographs beside the project")
def test_real_photographs_are_equal_pixel_by_pixel(decoder):
    for path in PHOTOS[::3] if decoder == "pil" else PHOTOS:
        assert_as_pil_converts_it(path, decoder)


def test_the_fast_decoder_decodes_plain_jpeg_files_and_no_others(tmp_path):
    """Pixels cannot tell; a tensor is what the fast decoder gives."""
    for kind, (_, image, how) in KINDS.items():
        image().save(tmp_path / kind, **how)
    photo().save(tmp_path / "misnamed.jpg", format="PNG")
    photo().save(tmp_path / "misnamed.png", format="JPEG")
    photo().save(tmp_path / "progressive.jpg", progressive=True)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo().save(tmp_path / "rotated.jpg", exif=exif)
    files = sorted(tmp_path.iterdir())
    assert all(isinstance(open_rgb(str(path), "pil"), Image.Image) for path in files)
    images = {path.name: open_rgb(str(path), "fast") for path in files}
    fast = {"colour.jpg", "grey.jpg", "misnamed.png", "progressive.jpg"}
    assert {name for name, image in images.items() if isinstance(image, Tensor)} == fast
    assert {images[name].shape for name in fast} == {(3, 37, 53)}


@pytest.mark.parametrize("before", [b"\xff\xdb", b"\xff\xda"])
def test_a_jpeg_file_of_unusual_form_is_read_as_by_pil(before, decoder, tmp_path):
    """A marker may be filled up with further 0xFF."""
    photo().save(tmp_path / "filled.jpg")
    content = (tmp_path / "filled.jpg").read_bytes()
    (tmp_path / "filled.jpg").write_bytes(content.replace(before, b"\xff\xff" + before, 1))
    assert_as_pil_converts_it(tmp_path / "filled.jpg", decoder)


def test_a_file_with_any_byte_damaged_is_named_or_read(decoder, tmp_path):
    """Whatever a decoder makes of it; nothing but DataError may come out."""
    path = tmp_path / "damaged.jpg"
    photo(8, 8).save(path, quality=1)
    whole = path.read_bytes()
    named = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert pixels(open_rgb(str(path), decoder)).shape[2] == 3
        except DataError as error:
            named += 1
            assert str(error).startswith(f"{path}: is no readable image (")
    assert 0 < named < len(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Values that PIL would clip


def grey_levels() -> np.ndarray:
    """uint8 [37, 53], darkest to brightest"""
    return np.linspace(0, 255, 37 * 53).round().astype(np.uint8).reshape(37, 53)


@pytest.mark.parametrize("low", [0, 1, 255])
@pytest.mark.parametrize(
    ("name", "mode"), [("x.png", "I;16"), ("little-endian.tif", "I;16"), ("big-endian.tif", "I;16B"), ("x.pgm", "I")]
)
def test_of_16_bits_the_upper_8_are_kept(name, mode, low, decoder, tmp_path):
    levels, path = grey_levels(), tmp_path / name
    values = (256 * levels.astype(np.uint16) + low).astype("<u2" if mode == "I;16" else ">u2")
    if name == "x.pgm":
        path.write_bytes(b"P5 53 37 65535\n" + values.tobytes())
    else:
        Image.frombytes(mode, (53, 37), values.tobytes()).save(path)
    assert Image.open(path).mode in (mode, "I")  # "I": Pillow 9
    np.testing.assert_array_equal(pixels(open_rgb(str(path), decoder)), np.stack([levels] * 3, axis=2))


def test_png_files_of_16_bits_are_read_where_pil_opens_them_in_mode_i(decoder, tmp_path, monkeypatch):
    """As Pillow 9 does."""
    Image.fromarray(257 * grey_levels().astype(np.uint16)).save(tmp_path / "x.png")
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    assert Image.open(tmp_path / "x.png").mode == "I"
    np.testing.assert_array_equal(pixels(open_rgb(str(tmp_path / "x.png"), decoder))[..., 0], grey_levels())


def test_colours_of_16_bits_lose_their_lower_8_too(decoder, tmp_path):
    """That is PIL's doing."""
    values = 257 * np.asarray(photo()).astype(np.uint16)
    (tmp_path / "x.ppm").write_bytes(b"P6 53 37 65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(open_rgb(str(tmp_path / "x.ppm"), decoder)), np.asarray(photo()))


@pytest.mark.parametrize("name", ["x.tif", "x.pfm"])
def test_floats_from_0_to_1_are_scaled(name, decoder, tmp_path):
    Image.fromarray(grey_levels().astype(np.float32) / 255).save(tmp_path / name)
    np.testing.assert_array_equal(pixels(open_rgb(str(tmp_path / name), decoder))[..., 0], grey_levels())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.float32([[0, 255]]), "float values from 0 to 255; only 0 .. 1 has a known scale"),
        (np.float32([[-0.5, 0.5]]), "float values from -0.5 to 0.5; only"),
        (np.float32([[0, np.nan]]), "float values from nan to nan; only"),
        (np.int32([[0, 255]]), "32-bit or signed integers, whose range is not known; save it with 8 or 16 bits"),
    ],
)
def test_values_of_unknown_range_are_refused(values, said, decoder, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError) as caught:
        open_rgb(str(tmp_path / "x.tif"), decoder)
    assert str(caught.value).startswith(f"{tmp_path / 'x.tif'}: is no readable image ({said}")


def save_digits(folder: Path, scale: np.unsignedinteger) -> None:
    """40 digits of each split, times ``scale``, in class folders and in the lists of ImageNet-LT."""
    digits = build_data("digits", "", image_size=8)
    for top, split, images in (("train", "train", digits.train), ("val", "test", digits.test)):
        lines = []
        for i, (pixels, label) in enumerate(zip(images.images[:40, ..., 0].numpy(), images.targets[:40], strict=True)):
            name = f"{top}/{label}/{i}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels * scale).save(folder / name)
            lines.append(f"{name} {label}\n")
        (folder / f"ImageNet_LT_{split}.txt").write_text("".join(lines))


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_digits_saved_with_16_bits_are_the_same_digits_and_the_log_says_so(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(SPECS, "imagenet", replace(SPECS["imagenet"], num_classes=10))
    save_digits(tmp_path / "8", np.uint8(1))
    save_digits(tmp_path / "16", np.uint16(257))
    eight, sixteen = (build_data(dataset, str(tmp_path / name), image_size=8) for name in ("8", "16"))
    for ours, theirs in zip(sixteen.test_loader(CPU), eight.test_loader(CPU), strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert theirs[0].unique().numel() > 10
    note = "{}: of 40 images looked at: 40 with 16 bits (reduced to 8); all become 8-bit RGB"
    assert sixteen.notes == [note.format("train"), note.format("test")]


def test_a_note_counts_what_is_converted(tmp_path):
    """Files that cannot be read are named when they are decoded."""
    for kind, (_, image, how) in KINDS.items():
        image().save(tmp_path / kind, **how)
    (tmp_path / "no image.png").touch()
    Image.fromarray(grey_levels() / np.float32(255)).save(tmp_path / "float.tif")
    paths = [*map(str, sorted(tmp_path.iterdir())), str(tmp_path / "missing.png")]
    assert conversion_notes("train", len(paths), paths.__getitem__) == [
        "train: of 17 images looked at: 4 with transparency (dropped), 3 in grayscale, 2 in CMYK, "
        "1 of floats (multiplied by 255), 1 with a palette; all become 8-bit RGB"
    ]
    colour = str(tmp_path / "colour.jpg")
    assert conversion_notes("train", 5, lambda index: colour) == conversion_notes("train", 0, paths.__getitem__) == []


@pytest.mark.parametrize(("total", "looked_at"), [(1, 1), (99, 99), (100, 50), (437_513, 100)])
def test_a_note_comes_from_a_hundred_files_of_all_parts_of_the_list(total, looked_at, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    asked = []
    (note,) = conversion_notes("test", total, lambda index: asked.append(index) or str(tmp_path / "grey.png"))
    assert note.startswith(f"test: of {looked_at} images looked at: {looked_at} in grayscale")
    assert len(asked) == looked_at and asked[0] == 0 and asked[-1] >= 0.97 * (total - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no images


def test_a_missing_image_is_named(decoder, tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg: no such image$"):
        open_rgb(str(tmp_path / "gone.jpg"), decoder)


def assert_unreadable(path: Path, decoder: str) -> None:
    with pytest.raises(DataError) as caught:
        open_rgb(str(path), decoder)
    assert str(caught.value).startswith(f"{path}: is no readable image (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
@pytest.mark.parametrize("kind", ["colour.jpg", "print.jpg", "colour.png", "print.tif"])
def test_a_truncated_image_is_named(kind, share, decoder, tmp_path):
    mode, _, how = KINDS[kind]
    photo(200, 150).convert(mode).save(tmp_path / kind, **how)
    content = (tmp_path / kind).read_bytes()
    (tmp_path / kind).write_bytes(content[: int(share * len(content))])
    assert_unreadable(tmp_path / kind, decoder)


@pytest.mark.parametrize("content", [b"", b"no image\n" * 100, b"\xff\xd8\xff\xe0" + b"\0" * 500, b"<html>\n</html>"])
def test_a_file_that_is_no_image_is_named(content, decoder, tmp_path):
    (tmp_path / "page.jpg").write_bytes(content)
    assert_unreadable(tmp_path / "page.jpg", decoder)
    assert_unreadable(tmp_path, decoder)


def test_an_image_with_a_damaged_part_in_the_middle_is_named(decoder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "damaged.png")
    first, second, rest = (tmp_path / "damaged.png").read_bytes().split(b"IDAT", 2)
    (tmp_path / "damaged.png").write_bytes(first + b"IDAT" + second + b"?DAT" + rest)
    assert_unreadable(tmp_path / "damaged.png", decoder)


def test_an_image_too_large_to_be_true_is_named(decoder, tmp_path, monkeypatch):
    photo().save(tmp_path / "huge.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 53 * 37 // 2 - 1)
    assert_unreadable(tmp_path / "huge.jpg", decoder)


@pytest.mark.parametrize("kind", ["colour.jpg", "colour.png"])
@pytest.mark.parametrize("size", [(1, 1001), (2001, 2)])
def test_an_image_that_scaling_would_blow_up_is_named(kind, size, decoder, tmp_path):
    """A thousand pixels take no memory; scaled until the short side has 256 they take as much as a bomb."""
    photo(*size).save(tmp_path / kind)
    assert_unreadable(tmp_path / kind, decoder)
    photo(1, 1000).save(tmp_path / kind)
    assert_as_pil_converts_it(tmp_path / kind, decoder)


def test_a_file_too_large_to_be_an_image_is_named_before_it_is_read(decoder, tmp_path):
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(decoding.MOST_BYTES + 1)  # a hole: it takes no place on the disk
    with pytest.raises(DataError, match="a file of more than 1 GiB"):
        open_rgb(str(tmp_path / "huge.jpg"), decoder)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO", "TGA"])
def test_a_format_that_no_data_set_has_is_not_opened_under_another_name(kind, decoder, tmp_path):
    """EPS is a program: PIL would have it run."""
    photo(32, 32).save(tmp_path / "image.jpg", kind)
    with pytest.raises(DataError, match=r"image.jpg: is no readable image \(none of JPEG, PNG,"):
        open_rgb(str(tmp_path / "image.jpg"), decoder)


@pytest.mark.parametrize("kind", decoding.FORMATS)
def test_every_format_of_the_table_is_read(kind, decoder, tmp_path):
    photo(32, 32).save(tmp_path / "image.jpg", kind)
    assert_as_pil_converts_it(tmp_path / "image.jpg", decoder)


SILENCE = """
import sys
from datasets.decoding import open_rgb
from datasets.source import DataError
try:
    open_rgb(sys.argv[1])
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_pil_prints_nothing_beside_the_message(tmp_path):
    """It logs and warns of some damage, on standard error, without the file's name."""
    photo().save(tmp_path / "photo.tif")
    content = bytearray((tmp_path / "photo.tif").read_bytes())
    at = content.index((277).to_bytes(2, "little") + (3).to_bytes(2, "little"))  # samples per pixel
    content[at + 8] = 200
    (tmp_path / "photo.tif").write_bytes(content)
    command = [sys.executable, "-c", SILENCE, str(tmp_path / "photo.tif")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path / 'photo.tif'}: is no readable image (")


def test_the_limit_of_the_size_can_be_lifted(decoder, tmp_path, monkeypatch):
    photo().save(tmp_path / "huge.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert isinstance(open_rgb(str(tmp_path / "huge.jpg"), decoder), Image.Image if decoder == "pil" else Tensor)


@pytest.mark.parametrize(
    "decoders",
    [
        "class VideoDecoder:\n    'Before 0.16 there were no images.'",
        "raise RuntimeError('Could not load libtorchcodec')",
        "raise OSError('libavutil.so.59: cannot open shared object file')",
    ],
)
def test_torchvision_decodes_where_torchcodec_is_too_old_or_does_not_load(
    decoders, no_cached_decoder, monkeypatch, tmp_path
):
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").touch()
    (tmp_path / "torchcodec" / "decoders.py").write_text(decoders)
    monkeypatch.syspath_prepend(tmp_path)
    photo().save(tmp_path / "colour.jpg")
    with patch.dict(sys.modules):  # forgets the package afterwards
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
            del sys.modules[name]
        assert fast_decoder() == "torchvision"
        assert sys.modules["torchcodec"].__file__.startswith(str(tmp_path))
        assert_as_pil_converts_it(tmp_path / "colour.jpg", "fast")
