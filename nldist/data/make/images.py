"""One raw image made fit for a shard: checked by decoding it, and copied or converted to plain 8-bit."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from nldist.data.make.exif import TURNS, orientation
from nldist.data.make.jpegs import ARITHMETIC, HUFFMAN, LOSSLESS, frame, is_whole

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more behind
PNG_END = b"IEND\xaeB`\x82"
Check = Literal["decode", "header"]
"""How an image that stays as it is is looked at: a JPEG decoded, or no further than its header and its last bytes."""


_Box = tuple[float, float, float, float]


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


class _Decoded(NamedTuple):
    """A decoded image.

    `file` is what was opened, `pixels` what was decoded, for a JPEG perhaps at a fraction of its `size` (width,
    height): then `box` is the part of it that the image fills. `turn` makes it upright.
    """

    file: Image.Image
    pixels: Image.Image
    size: tuple[int, int]
    box: _Box | None
    turn: Image.Transpose | None


def normalise(raw: bytes | np.ndarray, limits: Limits, resize: int | None = None, check: Check = "decode") -> Encoded:
    """Check one image by decoding it and make it plain: 8-bit RGB or grey, upright, one frame.

    An image that is plain already is returned byte for byte. Any other is converted (alpha is composited on
    white, 16-bit is scaled to 8-bit) and written as PNG if its source was lossless, else as JPEG of quality
    95 without chroma subsampling. With `resize`, an image whose short side (pixels) is longer than that is
    shrunk to it with an antialiasing Lanczos filter. `raw` is a file's bytes, or uint8 pixels (H, W) or
    (H, W, 3). With `check` "header" a JPEG that stays as it is is not decoded.

    Raises:
        BadImageError: it is empty, truncated, no image, of an unknown kind, or beyond `limits`.
    """
    if isinstance(raw, np.ndarray):
        pixels = Image.fromarray(raw)
        return _encode(_shrink(pixels, pixels.size, None, resize), lossy=False)
    if check == "header" and (plain := plain_jpeg(raw, limits, resize)):
        return plain
    file, pixels, size, box, turn = _decode(raw, limits, resize)
    is_as_opened = pixels is file and turn is None and not _is_shrunk(size, resize)
    if is_as_opened and _is_plain(file, raw) and _is_read_alike(file, raw):
        return Encoded(raw, EXTENSIONS[str(file.format)], size[1], size[0])
    with _refusing():
        lossy = _is_lossy(file, raw)
        pixels = _shrink(_to_8_bit(pixels), size, box, resize)
        return _encode(pixels if turn is None else pixels.transpose(turn), lossy)


def decoded_size(raw: bytes, limits: Limits) -> tuple[int, int]:
    """Decode an image and return its (height, width) in pixels as training sees it, EXIF rotation applied.

    Raises:
        BadImageError: as `normalise`; or training cannot decode it.
    """
    decoded = _decode(raw, limits)
    if _is_ordinary(decoded.file, raw):
        width, height = decoded.size
        return height, width
    height, width, _ = _as_trained(raw).shape
    return height, width


def plain_jpeg(raw: bytes, limits: Limits, resize: int | None) -> Encoded | None:
    """A JPEG, whole to its end, that `normalise` would return as it is: told without decoding it. None if it is not.

    Raises:
        BadImageError: it has no readable header.
    """
    if not is_whole(raw) or len(raw) > limits.max_bytes:
        return None
    with _refusing(), _own_pixel_limit():
        image = Image.open(io.BytesIO(raw), formats=("JPEG",))
    if image.width * image.height > limits.max_pixels or _is_shrunk(image.size, resize):
        return None
    return Encoded(raw, "jpg", image.height, image.width) if _is_ordinary(image, raw) else None


def _decode(raw: bytes, limits: Limits, resize: int | None = None) -> _Decoded:
    """Pillow finds out what it is, whether it is damaged and what its pixels are, if they are needed.

    But training's decoder decides what an image is (`_is_ordinary`).
    """
    if not raw:
        raise BadImageError("empty file")
    if len(raw) > limits.max_bytes:
        raise BadImageError(f"{len(raw):,} bytes are more than the limit of {limits.max_bytes:,}")
    with _refusing(), _own_pixel_limit():
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        size = image.size
        if image.width * image.height > limits.max_pixels:
            text = f"{image.width} x {image.height} pixels"
            raise BadImageError(f"{text} are more than the limit of {limits.max_pixels:,}")
        if image.format == "PNG":
            _check_png(raw)
        box = _scale(image, raw, resize)
        try:
            image.load()
        except OSError:
            if frame(raw) not in ARITHMETIC:  # of which Pillow reads only those that are small
                raise
            pixels = Image.fromarray(_as_trained(raw))
            return _Decoded(image, pixels, pixels.size, None, None)
        return _Decoded(image, image, size, box, TURNS.get(orientation(image)))


def _scale(image: Image.Image, raw: bytes, resize: int | None) -> _Box | None:
    """Let libjpeg decode at a half, a quarter or an eighth of the size where that is enough; returns the image's box.

    All of a file is read in any case, and what is damaged is found alike. Twice the size that is wanted is enough for
    the filter that shrinks it; for an image that stays as it is any size is.
    """
    if image.format != "JPEG":
        return None
    if resize is not None and _is_shrunk(image.size, resize):
        width, height = (2 * side for side in _target(image.size, resize))
    elif _is_ordinary(image, raw):
        width = height = 1
    else:
        return None
    drafted = image.draft(None, (width, height))
    return drafted[1] if drafted else None


def _as_trained(raw: bytes) -> np.ndarray:
    """The pixels (H, W, 3) as training decodes them. Raises BadImageError if it cannot."""
    from nldist.data.decode import DecodeError, decoded  # torch takes seconds

    try:
        return decoded(raw)
    except DecodeError as error:
        raise BadImageError(f"training cannot decode it: {error}") from None


def _is_ordinary(image: Image.Image, raw: bytes) -> bool:
    """Whether Pillow has decoded a file of a kind that torchvision reads alike, so that it need not be loaded."""
    if orientation(image) not in (0, 1):
        return False
    if image.format == "PNG":
        return raw[24] == 8
    if image.format == "WEBP":
        return not getattr(image, "is_animated", False)
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and frame(raw) in HUFFMAN


def _is_read_alike(image: Image.Image, raw: bytes) -> bool:
    """Whether training sees this image, which is plain, in the same size."""
    if _is_ordinary(image, raw):
        return True
    try:
        return _as_trained(raw).shape[:2] == (image.height, image.width)
    except BadImageError:
        return False


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
    return image.format in ("JPEG", "MPO") and frame(raw) not in LOSSLESS


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
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("32-bit pixels have no known range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _is_shrunk(size: tuple[int, int], resize: int | None) -> bool:
    return resize is not None and min(size) > resize


def _target(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """The size (width, height) to which an image is shrunk."""
    width, height = (max(1, round(side * resize / min(size))) for side in size)
    return width, height


def _shrink(
    image: Image.Image,
    size: tuple[int, int],
    box: _Box | None,
    resize: int | None,
) -> Image.Image:
    """Shrink an image of this size, that fills this box of its pixels, if it is larger than `resize`."""
    if resize is None or not _is_shrunk(size, resize):
        return image
    return image.resize(_target(size, resize), Image.Resampling.LANCZOS, box)


def _encode(image: Image.Image, lossy: bool) -> Encoded:
    image.info = {}  # else Pillow would write the source's profile, transparency and EXIF again
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "jpg" if lossy else "png", image.height, image.width)
