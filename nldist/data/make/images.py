"""One raw image made fit for a shard: checked by a full decode, and copied or converted to plain 8-bit."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more behind
ORIENTATION = 0x0112
JPEG_BEGIN, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_END = b"IEND\xaeB`\x82"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's start-of-frame markers
HUFFMAN = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive: all but a few of the JPEGs that there are
ARITHMETIC = {0xC9, 0xCA}
LOSSLESS = {0xC3, 0xCB}


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason, for the list of refused images."""


@dataclass(frozen=True)
class Limits:
    """What an image may cost: `max_pixels` (width x height) when decoded, `max_bytes` as a file.

    Beyond either an image is refused before it is decoded, so a decompression bomb costs nothing.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class Encoded:
    """An image as it goes into a shard: file bytes, extension (jpg, png or webp), and size in pixels."""

    data: bytes
    extension: str
    height: int
    width: int


def normalise(raw: bytes | np.ndarray, limits: Limits, resize: int | None = None) -> Encoded:
    """Check one image by a full decode and make it plain: 8-bit RGB or grey, upright, one frame.

    An image that is plain already is returned byte for byte. Any other is converted (alpha is composited on
    white, 16-bit is scaled to 8-bit) and written as PNG if its source was lossless, else as JPEG of quality
    95 without chroma subsampling. With `resize`, an image whose short side (pixels) is longer than that is
    shrunk to it with an antialiasing Lanczos filter. `raw` is a file's bytes, or uint8 pixels (H, W) or
    (H, W, 3).

    Raises:
        BadImageError: it is empty, truncated, no image, of an unknown kind, or beyond `limits`.
    """
    if isinstance(raw, np.ndarray):
        image: Image.Image = Image.fromarray(raw)
        return _encode(_shrink(image, resize), lossy=False)
    image, upright = _decode(raw, limits)
    shrunk = resize is not None and min(upright.size) > resize
    if not shrunk and upright is image and _is_plain(image, raw) and _is_read_alike(image, raw):
        return Encoded(raw, EXTENSIONS[str(image.format)], image.height, image.width)
    with _refusing():
        return _encode(_shrink(_to_8_bit(upright), resize), lossy=_is_lossy(image, raw))


def decoded_size(raw: bytes, limits: Limits) -> tuple[int, int]:
    """Decode an image in full and return its (height, width) in pixels as training sees it, EXIF rotation applied.

    Raises:
        BadImageError: as `normalise`; or training cannot decode it.
    """
    image, upright = _decode(raw, limits)
    if _is_ordinary(image, raw):
        return upright.height, upright.width
    height, width, _ = _as_trained(raw).shape
    return height, width


def is_plain_jpeg(raw: bytes, limits: Limits, resize: int | None) -> bool:
    """Whether this is a JPEG, whole to its end, that `normalise` would return as it is: told without decoding it.

    Raises:
        BadImageError: it has no readable header.
    """
    if raw[:2] != JPEG_BEGIN or not raw.rstrip(b"\0").endswith(JPEG_END) or len(raw) > limits.max_bytes:
        return False
    with _refusing(), _own_pixel_limit():
        image = Image.open(io.BytesIO(raw), formats=("JPEG",))
    fits = image.width * image.height <= limits.max_pixels and (resize is None or min(image.size) <= resize)
    return fits and _is_ordinary(image, raw)


def _decode(raw: bytes, limits: Limits) -> tuple[Image.Image, Image.Image]:
    """The opened image, and the same turned upright (the very same object if it was upright).

    Pillow finds out what it is, whether it is damaged and what its pixels are; but training's decoder decides what an
    image is (`_is_ordinary`).
    """
    if not raw:
        raise BadImageError("empty file")
    if len(raw) > limits.max_bytes:
        raise BadImageError(f"{len(raw):,} bytes are more than the limit of {limits.max_bytes:,}")
    with _refusing(), _own_pixel_limit():
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height > limits.max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise BadImageError(f"{size} are more than the limit of {limits.max_pixels:,}")
        if image.format == "PNG":
            _check_png(raw)
        try:
            image.load()
        except OSError:
            if _frame(raw) not in ARITHMETIC:  # of which Pillow reads only those that are small
                raise
            return image, Image.fromarray(_as_trained(raw))
        upright = ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image
    return image, upright


def _as_trained(raw: bytes) -> np.ndarray:
    """The pixels (H, W, 3) as training decodes them. Raises BadImageError if it cannot."""
    from nldist.data.decode import DecodeError, decoded  # torch takes seconds

    try:
        return decoded(bytearray(raw)).permute(1, 2, 0).numpy()
    except DecodeError as error:
        raise BadImageError(f"training cannot decode it: {error}") from None


def _is_ordinary(image: Image.Image, raw: bytes) -> bool:
    """Whether Pillow has decoded a file of a kind that torchvision reads alike, so that it need not be loaded."""
    if _orientation(image) not in (0, 1):
        return False
    if image.format == "PNG":
        return raw[24] == 8
    if image.format == "WEBP":
        return not getattr(image, "is_animated", False)
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _frame(raw) in HUFFMAN


def _is_read_alike(image: Image.Image, raw: bytes) -> bool:
    """Whether training sees this image, which is plain, in the same size."""
    if _is_ordinary(image, raw):
        return True
    try:
        return _as_trained(raw).shape[:2] == (image.height, image.width)
    except BadImageError:
        return False


def _frame(raw: bytes) -> int:
    """The marker of a JPEG's frame, which tells its process of coding; 0 if there is none."""
    place = 2
    while raw[:2] == b"\xff\xd8" and place + 4 <= len(raw) and raw[place] == 0xFF:
        marker = raw[place + 1]
        if marker in FRAMES:
            return marker
        place += 1 if marker == 0xFF else 2 + int.from_bytes(raw[place + 2 : place + 4], "big")
    return 0


def _check_png(raw: bytes) -> None:
    # Pillow's decoder tolerates a cut or damaged end, which torchvision's may not survive.
    Image.open(io.BytesIO(raw), formats=("PNG",)).verify()
    if PNG_END not in raw:
        raise BadImageError("truncated")


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn whatever Pillow raises into BadImageError: its decoders fail on foreign bytes in a dozen ways."""
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image of a known kind") from None
    except Exception as error:
        raise BadImageError(f"does not decode: {error or type(error).__name__}") from error


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Switch Pillow's own limit off, so that `Limits.max_pixels` is the only one."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the rotation; image viewers ignore it too
        return None


def _is_plain(image: Image.Image, raw: bytes) -> bool:
    """Whether Pillow and torchvision read the same RGB pixels from the file as it stands."""
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        return False
    if image.format == "PNG":  # bit depth 8, colour type grey or RGB, not animated
        return raw[24] == 8 and raw[25] in (0, 2) and not getattr(image, "is_animated", False)
    if image.format == "WEBP":
        return not getattr(image, "is_animated", False)
    return image.format in ("JPEG", "MPO")


def _is_lossy(image: Image.Image, raw: bytes) -> bool:
    if image.format == "WEBP":
        return b"VP8 " in raw  # the chunk of WebP's lossy codec
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    return image.format in ("JPEG", "MPO") and _frame(raw) not in LOSSLESS


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to RGB or L, transparent parts on white."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("32-bit pixels have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _shrink(image: Image.Image, resize: int | None) -> Image.Image:
    short = min(image.size)
    if resize is None or short <= resize:
        return image
    width, height = (max(1, round(side * resize / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _encode(image: Image.Image, lossy: bool) -> Encoded:
    image.info = {}  # else Pillow would write the source's profile, transparency and EXIF again
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "jpg" if lossy else "png", image.height, image.width)
