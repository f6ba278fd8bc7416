"""What is indexed can be trained on: sharding, indexing, verify and training agree on what an image is."""

import base64
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from nldist.data import decode
from nldist.data.decode import decoded
from nldist.data.index import Index
from nldist.data.make import images as images_module
from nldist.data.reader import Reader
from tests.data.command import label_names, nldist, rejected, shard, shard_well, write_image, write_tar

# 40 x 24 pixels each, for what Pillow cannot write.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQ"
    "YEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAYACgDASIA"
    "AhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AHL8MFWQPm9AhyQ6WZbHT6zgg1+zXFcq4JYR5iSIal5m+9AA5BoTee6LSQH2wuTEiZFc"
    "JZfqctEY+Qb1xpO9filA1slIa2n8QqlUHOpFiA242u5o/9k="
)
LOSSLESS_GREY = base64.b64decode(
    "/9j/xAAWAAEBAQAAAAAAAAAAAAAAAAABAgj/wwALCAAYACgBABEA/9oACAEAAAYAAM/3d3d3d3d3d3d3d3d3d3d3d3d3d0qqqqqqqqqqqqrSqqqqqqqq"
    "qqqqtKqqqqqqqqqqqq0qqqqqqqqqqqqrSqqqqqqqqqqqqtKqqqqqqqqqqqq0qqqqqqqqqqqqrSqqqqqqqqqqqqtKqqqqqqqqqqqq0qqqqqqqqqqqqr"
    "SqqqqqqqqqqqqtKqqqqqqqqqqqq0qqqqqqqqqqqqrSqqqqqqqqqqqqtKqqqqqqqqqqqq0qqqqqqqqqqqqrSqqqqqqqqqqqqtKqqqqqqqqqqqq0qqqq"
    "qqqqqqqqrSqqqqqqqqqqqqtKqqqqqqqqqqqq0qqqqqqqqqqqqrSqqqqqqqqqqqqo/9k="
)


def above_64_kib(jpeg: bytes) -> bytes:
    """The same image, with a comment that moves its scan over the end of Pillow's buffer."""
    length = 2**16 - jpeg.index(b"\xff\xda") - 104
    return jpeg[:2] + b"\xff\xfe" + (length + 2).to_bytes(2, "big") + bytes(length) + jpeg[2:]


def picture() -> Image.Image:
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([x * 6, y * 10, 255 - x * 3], -1).astype(np.uint8))


def encode(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    return encode(kind, save_all=True, append_images=[picture().rotate(180)])


def turned(orientation: int = 6) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">' + (
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
IMAGES = {
    "jpeg": encode("JPEG"),
    "progressive": encode("JPEG", progressive=True),
    "cmyk": encode("JPEG", picture().convert("CMYK")),
    "mpo": animated("MPO"),
    "turned-jpeg": encode("JPEG", exif=turned()),
    "odd-orientation": encode("JPEG", exif=turned(9)),
    "xmp-jpeg": encode("JPEG", xmp=XMP),
    "broken-exif": encode("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\1\x12"),
    "arithmetic": ARITHMETIC,
    "large-arithmetic": above_64_kib(ARITHMETIC),
    "lossless-grey": LOSSLESS_GREY,
    "png": encode("PNG"),
    "palette": encode("PNG", picture().quantize(8)),
    "1-bit": encode("PNG", picture().convert("1")),
    "16-bit": encode("PNG", Image.fromarray(np.full((24, 40), 5000, np.uint16))),
    "alpha": encode("PNG", picture().convert("RGBA")),
    "turned-png": encode("PNG", exif=turned()),
    "animated-png": animated("PNG"),
    "webp": encode("WEBP"),
    "turned-webp": encode("WEBP", exif=turned()),
    "animated-webp": animated("WEBP"),
    "gif": encode("GIF", picture().quantize(8)),
    "animated-gif": animated("GIF"),
    "bmp": encode("BMP"),
    "tiff": encode("TIFF"),
    "ppm": encode("PPM"),
    "cut": encode("JPEG")[:-40],
    "text": b"no image",
    "empty": b"",
}


def by_torchvision(data: bytes) -> tuple[int, int] | None:
    """Height and width as torchvision decodes it, None if that is no single image."""
    try:
        return pixels_by_torchvision(data).shape[:2]  # type: ignore[return-value]
    except (RuntimeError, ValueError):
        return None


def pixels_by_torchvision(data: bytes) -> np.ndarray:
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB, True)
    pixels: np.ndarray = image.permute(1, 2, 0).numpy()
    return pixels


def sizes(out: Path) -> dict[str, tuple[int, int]]:
    rows = pq.read_table(out / "train/index.parquet").to_pydict()
    return {key: size for key, *size in zip(rows["key"], rows["height"], rows["width"], strict=True)}  # type: ignore[misc]


def exif_behind_the_frame(jpeg: bytes) -> bytes:
    """The same image, with its EXIF block in front of the scan."""
    start = jpeg.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
    scan = jpeg.index(b"\xff\xda")
    return jpeg[:start] + jpeg[end:scan] + jpeg[start:end] + jpeg[scan:]


JPEGS = {name: data for name, data in IMAGES.items() if data[:2] == b"\xff\xd8" and by_torchvision(data)}
JPEGS |= {f"orientation {number}": encode("JPEG", exif=turned(number)) for number in range(1, 9)}
JPEGS |= {
    "bytes between segments": JPEGS["jpeg"].replace(b"\xff\xdb", bytes(5) + b"\xff\xdb", 1),
    "fill bytes": JPEGS["jpeg"].replace(b"\xff\xdb", 3 * b"\xff" + b"\xff\xdb", 1),
    "turned behind the frame": exif_behind_the_frame(encode("JPEG", exif=turned())),
    "a comment that looks like EXIF": encode("JPEG", comment=b"\xff\xe1\0\x08Exif\0\0"),
    "its colours as they are": encode("JPEG", keep_rgb=True),
    "marks to start again": encode("JPEG", restart_marker_rows=1),
}


@pytest.mark.parametrize("name", JPEGS)
def test_every_jpeg_has_the_pixels_that_torchvision_gives_it(name: str) -> None:
    wanted = pixels_by_torchvision(JPEGS[name])
    assert np.array_equal(decoded(JPEGS[name]), wanted)
    into = np.full_like(wanted, 7)
    assert np.array_equal(decoded(JPEGS[name], into), wanted)
    for other in (into[1:], into[:, 1:].copy(), np.empty((*wanted.shape[:1], wanted.shape[1] + 1, 3), np.uint8)):
        assert np.array_equal(decoded(JPEGS[name], other), wanted)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (32, 32), (33, 47), (224, 224)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_so_it_is_for_every_size_quality_and_subsampling(size: tuple[int, int], mode: str) -> None:
    image = Image.effect_noise(size, 80).convert(mode)
    for quality in (10, 75, 100):
        for subsampling in (0, 1, 2, "4:1:1"):
            for progressive in (False, True):
                data = encode("JPEG", image, quality=quality, subsampling=subsampling, progressive=progressive)
                wanted = pixels_by_torchvision(data)
                assert np.array_equal(decoded(data, np.empty_like(wanted)), wanted)


def test_common_jpegs_are_decoded_where_they_belong_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: bytes) -> np.ndarray:
        raise AssertionError

    monkeypatch.setattr(decode, "_by_torchvision", fail)
    for name in ("jpeg", "progressive", "mpo", "marks to start again"):
        into = np.empty((24, 40, 3), np.uint8)
        assert decoded(JPEGS[name], into) is into
    for name in ("cmyk", "turned-jpeg", "turned behind the frame", "xmp-jpeg", "arithmetic"):
        with pytest.raises(AssertionError):
            decoded(JPEGS[name])


def test_what_is_indexed_is_what_torchvision_decodes(tmp_path: Path) -> None:
    expected = {name: size for name, data in IMAGES.items() if (size := by_torchvision(data))}
    assert {"bmp", "animated-webp", "animated-gif", "lossless-grey"}.isdisjoint(expected)
    assert {"large-arithmetic", "gif", "turned-webp", "animated-png"} <= expected.keys()
    members = [member for name, data in IMAGES.items() for member in ((f"{name}.jpg", data), (f"{name}.cls", b"0"))]
    out = tmp_path / "out"
    shard_well("webdataset", write_tar(tmp_path / "t.tar", members), out, "--on-bad", "skip")
    assert {name: tuple(size) for name, size in sizes(out).items()} == expected
    assert rejected(out).keys() == IMAGES.keys() - expected.keys()
    assert "training cannot decode it" in rejected(out)["bmp"]
    index = Index.open(out, "train")
    assert len(Reader(index, "refuse", 64).read(np.arange(len(index))).kept) == len(expected)
    assert nldist("verify", out, "--workers", 0).code == 0


@pytest.mark.parametrize("layout", ["folder", "csv"])
def test_what_is_sharded_can_be_trained_on(tmp_path: Path, layout: str) -> None:
    bad = {"cut", "text", "empty"}
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "a").mkdir(parents=True)
    for name, data in IMAGES.items():
        (raw / "a" / f"{name}.jpg").write_bytes(data)
    (raw / "list.csv").write_text("path,label\n" + "".join(f"a/{name}.jpg,a\n" for name in IMAGES))
    if layout == "folder":
        (raw / "list.csv").unlink()
    shard_well(layout, raw if layout == "folder" else raw / "list.csv", out, "--on-bad", "skip")
    assert label_names(out) == {f"a/{name}": "a" for name in IMAGES.keys() - bad}
    index = Index.open(out, "train")
    assert len(Reader(index, "refuse", 64).read(np.arange(len(index))).kept) == len(IMAGES) - len(bad)
    assert nldist("verify", out, "--workers", 0).code == 0
    keys = index.keys(range(len(index)))
    for name in ("arithmetic", "large-arithmetic", "bmp"):
        pixels = Reader(index, "refuse", 64).read(np.array([keys.index(f"a/{name}")])).pixels[0].numpy()
        assert np.abs(pixels.astype(int) - np.asarray(picture())).mean() < 20
    with tarfile.open(out / "train/train-000000.tar") as tar:
        assert "a/lossless-grey.png" in tar.getnames()  # lossless stays lossless


def test_verify_finds_images_that_an_older_version_indexed(tmp_path: Path) -> None:
    members = [("x.jpg", IMAGES["jpeg"]), ("x.cls", b"0"), ("y.jpg", IMAGES["bmp"]), ("y.cls", b"0")]
    out, tar = tmp_path / "out", write_tar(tmp_path / "t.tar", members)
    shard_well("webdataset", tar, out, "--image-key", "jpg", "--on-bad", "skip")
    path = out / "train/index.parquet"
    table = pq.read_table(path)
    with tarfile.open(tar) as opened:
        member = opened.getmember("y.jpg")
    change = {"offset": member.offset_data, "size": member.size, "crc32": zlib.crc32(IMAGES["bmp"]), "key": "y"}
    row = pa.Table.from_pylist([table.to_pylist()[0] | change], table.schema)
    pq.write_table(row, path)
    done = nldist("verify", out, "--workers", 0)
    assert "the image is bad: training cannot decode it" in done.out


def test_ordinary_images_are_not_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading torchvision takes seconds, in each process."""

    def fail(_: bytes) -> np.ndarray:
        raise AssertionError

    monkeypatch.setattr(images_module, "_as_trained", fail)
    for number, name in enumerate(("jpeg", "progressive", "png", "webp")):
        write_image(tmp_path / f"raw/a/{number}.png").write_bytes(IMAGES[name])
    assert shard("folder", tmp_path / "raw", tmp_path / "out").code == 0
