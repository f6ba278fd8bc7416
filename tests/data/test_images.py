"""Every kind of raw image comes out plain, with the right pixels, whoever decodes it."""

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image

from nldist.data.make.images import BadImageError, Encoded, Limits, decoded_size, normalise

LIMITS = Limits()


def picture(height: int = 30, width: int = 44) -> Image.Image:
    """A smooth colour image, so that JPEG keeps it closely."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / width, y * 255 / height, 255 - (x + y) * 255 / (height + width)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(result: Encoded) -> np.ndarray:
    """The RGB pixels (H, W, 3), which Pillow and torchvision must agree upon."""
    by_pillow = np.asarray(Image.open(io.BytesIO(result.data)).convert("RGB")).astype(int)
    data = torch.frombuffer(bytearray(result.data), dtype=torch.uint8)
    by_torchvision = decode_image(data, ImageReadMode.RGB)
    assert by_torchvision.dtype == torch.uint8
    assert np.abs(by_torchvision.permute(1, 2, 0).numpy().astype(int) - by_pillow).max() <= 2
    assert by_pillow.shape[:2] == (result.height, result.width)
    return by_pillow


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


PLAIN = {
    "jpeg": (encode(picture(), "JPEG", quality=70), "jpg"),
    "progressive jpeg": (encode(picture(), "JPEG", progressive=True), "jpg"),
    "grey jpeg": (encode(picture().convert("L"), "JPEG"), "jpg"),
    "upright jpeg": (encode(picture(), "JPEG", exif=exif(1)), "jpg"),
    "jpeg with bytes behind": (encode(picture(), "JPEG") + b"behind", "jpg"),
    "mpo": (encode(picture(), "MPO", save_all=True, append_images=[picture()]), "jpg"),
    "png": (encode(picture(), "PNG"), "png"),
    "grey png": (encode(picture().convert("L"), "PNG"), "png"),
    "webp": (encode(picture(), "WEBP"), "webp"),
    "lossless webp": (encode(picture(), "WEBP", lossless=True), "webp"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_image_is_copied_byte_for_byte(name: str) -> None:
    raw, extension = PLAIN[name]
    result = normalise(raw, LIMITS)
    assert result.data == raw
    assert (result.extension, result.height, result.width) == (extension, 30, 44)
    pixels(result)


def on_white(image: Image.Image) -> np.ndarray:
    """Alpha compositing written out."""
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(int)


def with_alpha() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(44) * 5, (30, 1)).astype(np.uint8)))
    return image


def grey_alpha() -> Image.Image:
    return with_alpha().convert("LA")


def palette() -> Image.Image:
    return picture().quantize(16)


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def transparent_palette() -> tuple[bytes, np.ndarray]:
    image = palette()
    expected = rgb(image)
    expected[np.asarray(image) == 3] = 255
    return encode(image, "PNG", transparency=3), expected


def transparent_rgb() -> tuple[bytes, np.ndarray]:
    image = picture()
    image.paste((1, 2, 3), (0, 0, 9, 9))
    expected = rgb(image)
    expected[:9, :9] = 255
    return encode(image, "PNG", transparency=(1, 2, 3)), expected


def one_bit() -> Image.Image:
    return picture().convert("1")


def animated(kind: str, **options: Any) -> bytes:
    return encode(picture(), kind, save_all=True, append_images=[picture().rotate(180)], **options)


LOSSLESS = {
    "alpha png": (encode(with_alpha(), "PNG"), on_white(with_alpha())),
    "grey and alpha png": (encode(grey_alpha(), "PNG"), on_white(grey_alpha())),
    "alpha lossless webp": (encode(with_alpha(), "WEBP", lossless=True, exact=True), on_white(with_alpha())),
    "palette png": (encode(palette(), "PNG"), rgb(palette())),
    "palette png with a transparent colour": transparent_palette(),
    "rgb png with a transparent colour": transparent_rgb(),
    "1-bit png": (encode(one_bit(), "PNG"), rgb(one_bit())),
    "bmp": (encode(picture(), "BMP"), rgb(picture())),
    "tiff": (encode(picture(), "TIFF"), rgb(picture())),
    "1-bit tiff": (encode(one_bit(), "TIFF"), rgb(one_bit())),
    "gif": (encode(palette(), "GIF"), rgb(palette())),
    "grey gif": (encode(picture().convert("L"), "GIF"), rgb(picture().convert("L"))),
    "animated png": (animated("PNG"), rgb(picture())),
    "animated lossless webp": (animated("WEBP", lossless=True), rgb(picture())),
    "rotated png": (encode(picture(), "PNG", exif=exif(6)), np.rot90(rgb(picture()), -1)),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_source_becomes_png_with_the_same_pixels(name: str) -> None:
    raw, expected = LOSSLESS[name]
    result = normalise(raw, LIMITS)
    assert result.extension == "png"
    found = pixels(result)
    assert np.abs(found - expected).max() <= (1 if "alpha" in name else 0)  # 1: rounding of the compositing


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 30 * 44).reshape(30, 44).astype(np.uint16)
    found = pixels(normalise(encode(Image.fromarray(values), kind), LIMITS))
    np.testing.assert_array_equal(found[..., 0], np.round(values / 257).astype(int))


def test_16_bit_rgb_png() -> None:
    values = np.linspace(0, 65535, 6 * 5 * 3).reshape(6, 5, 3).astype(">u2")
    found = pixels(normalise(png(5, 6, depth=16, colour=2, rows=values.reshape(6, -1)), LIMITS))
    assert np.abs(found - values / 257).max() <= 1


def test_4_bit_grey_png() -> None:
    values = (np.arange(6 * 4) % 256).astype(np.uint8).reshape(6, 4)
    found = pixels(normalise(png(8, 6, depth=4, colour=0, rows=values), LIMITS))
    expected = np.stack([values >> 4, values & 15], -1).reshape(6, 8) * 17
    np.testing.assert_array_equal(found[..., 0], expected)


def png(width: int, height: int, depth: int, colour: int, rows: np.ndarray) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


CMYK = encode(picture().convert("CMYK"), "JPEG", quality=95)
LOSSY = {
    "cmyk jpeg, inverted as Adobe does": (CMYK, rgb(picture())),
    "alpha webp": (encode(with_alpha(), "WEBP", quality=95, exact=True), on_white(with_alpha())),
    "jpeg tiff": (encode(picture(), "TIFF", compression="jpeg", quality=95), rgb(picture())),
    **{
        f"jpeg with EXIF orientation {number}": (
            encode(picture().transpose(undo), "JPEG", quality=95, subsampling=0, exif=exif(number)),
            rgb(picture()),
        )
        for number, undo in {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }.items()
    },
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_source_becomes_fine_jpeg(name: str) -> None:
    raw, expected = LOSSY[name]
    assert b"Adobe" in CMYK
    result = normalise(raw, LIMITS)
    assert result.extension == "jpg"
    saved: Any = Image.open(io.BytesIO(result.data))
    assert [layer[1:3] for layer in saved.layer] == [(1, 1)] * 3  # 4:4:4
    assert 0x0112 not in saved.getexif()
    assert np.abs(pixels(result) - expected).mean() < 3


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png")])
def test_resize_shrinks_the_short_side_only_of_larger_images(kind: str, extension: str) -> None:
    raw = encode(picture(120, 176), kind)
    small = normalise(raw, LIMITS, resize=30)
    assert (small.extension, small.height, small.width) == (extension, 30, 44)
    expected = rgb(picture(120, 176).resize((44, 30), Image.Resampling.LANCZOS))
    assert np.abs(pixels(small) - expected).max() <= (0 if kind == "PNG" else 12)
    assert normalise(raw, LIMITS, resize=120).data == raw
    assert normalise(raw, LIMITS, resize=500).data == raw


def test_resize_looks_at_the_upright_image() -> None:
    result = normalise(encode(picture(120, 176), "JPEG", exif=exif(6)), LIMITS, resize=30)
    assert (result.height, result.width) == (44, 30)


def detailed(height: int, width: int) -> Image.Image:
    """A picture with edges of all directions, which would show a shift or ringing."""
    y, x = np.mgrid[:height, :width] - np.array([height, width])[:, None, None] / 2
    rings = 128 + 100 * np.sin(np.hypot(x, y) / width * 60)
    return Image.fromarray(np.stack([rings, x % 255, 255 - rings], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(1027, 1283), (2051, 1601), (515, 1030)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_decoding_at_a_fraction_shrinks_as_decoding_in_full_does(size: tuple[int, int], orientation: int) -> None:
    raw = encode(detailed(*size), "JPEG", quality=90, exif=exif(orientation))
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    scale = 128 / min(size)
    target = (round(whole.width * scale), round(whole.height * scale))
    small = whole.resize(target, Image.Resampling.LANCZOS)
    expected = rgb(Image.open(io.BytesIO(encode(small, "JPEG", quality=95, subsampling=0))))
    result = normalise(raw, LIMITS, resize=128)
    assert (result.width, result.height) == target
    by_encoding = rms(expected - rgb(small))
    assert rms(pixels(result) - expected) < 1.25 * by_encoding


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2.0).mean()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("resize", [None, 24])
def test_a_damaged_jpeg_is_refused_just_where_decoding_in_full_refuses_it(
    options: dict[str, Any], resize: int | None
) -> None:
    raw = encode(detailed(97, 130), "JPEG", **options)
    random = np.random.default_rng(len(raw))
    reasons = set()
    for _ in range(150):
        start, length = random.integers(len(raw)), random.integers(1, 60)
        middle = random.bytes(int(length)) if random.random() < 0.5 else b""
        damaged = raw[:start] + middle + raw[start + (length if random.random() < 0.7 else len(raw)) :]
        reasons.add(expected := reason(decode_in_full, damaged))
        assert reason(normalise, damaged, LIMITS, resize) == expected
    assert len(reasons) > 2


def decode_in_full(raw: bytes) -> None:
    Image.open(io.BytesIO(raw), formats=["JPEG"]).load()


def reason(attempt: Callable[..., object], *arguments: object) -> str | None:
    try:
        attempt(*arguments)
    except UnidentifiedImageError:
        return "not an image of a known kind"
    except BadImageError as error:
        return str(error).removeprefix("does not decode: ")
    except Exception as error:
        return str(error)
    return None


def test_pixels_are_stored_losslessly() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    result = normalise(grey, LIMITS)
    assert result.extension == "png"
    np.testing.assert_array_equal(pixels(result), np.repeat(grey[..., None], 3, -1))


def damaged_png() -> bytes:
    raw = bytearray(PLAIN["png"][0])
    raw[len(raw) // 2] ^= 0x10
    return bytes(raw)


BOMB = png(60_000, 60_000, depth=1, colour=0, rows=np.zeros((1, 7_500), np.uint8))
BAD = {
    "empty": b"",
    "text": b"this is no image",
    "html": b"<html><body>404 Not Found</body></html>",
    "header only": PLAIN["jpeg"][0][:20],
    "bomb": BOMB,
    "damaged png": damaged_png(),
    "float tiff": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    **{f"cut {name}": raw[: len(raw) * 2 // 3] for name, (raw, _) in PLAIN.items() if name != "mpo"},
    **{
        f"{name} without its end": raw[:-3]
        for name, (raw, _) in PLAIN.items()
        if "behind" not in name and name != "mpo"
    },
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_refused(name: str) -> None:
    with pytest.raises(BadImageError):
        normalise(BAD[name], LIMITS)


def test_limits_are_inclusive_and_say_what_they_are() -> None:
    raw = PLAIN["jpeg"][0]
    normalise(raw, Limits(max_pixels=30 * 44, max_bytes=len(raw)))
    with pytest.raises(BadImageError, match="44 x 30 pixels"):
        normalise(raw, Limits(max_pixels=30 * 44 - 1))
    with pytest.raises(BadImageError, match="bytes"):
        normalise(raw, Limits(max_bytes=len(raw) - 1))


def test_our_limit_replaces_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decoded_size(PLAIN["jpeg"][0], LIMITS) == (30, 44)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_decoded_size_is_of_the_upright_image() -> None:
    assert decoded_size(encode(picture(), "JPEG", exif=exif(6)), LIMITS) == (44, 30)
