"""Tars that somebody else wrote: each image has its own label, or is refused; what stock WebDataset reads, is read."""

import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from nldist.data.index import Index
from nldist.data.reader import Reader
from tests.data.command import image_bytes, label_names, nldist, rejected, shard, shard_well, write_image, write_tar

HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


def sample(key: str, number: int, extension: str = "png") -> list[tuple[str, Any]]:
    """An image of the colour `number` and the label of this number."""
    return [(f"{key}.{extension}", image_bytes(number)), (f"{key}.cls", b"%d" % number)]


def stock(path: Path) -> dict[str, int]:
    """What plain WebDataset reads: the label of each sample that has an image and one."""
    stream = webdataset.WebDataset([str(path)], shardshuffle=False)
    return {found["__key__"]: int(found["cls"]) for found in stream if {"png", "cls"} <= found.keys()}


def labels(out: Path) -> dict[str, int]:
    return {key: int(name) for key, name in label_names(out).items()}


def check(out: Path) -> None:
    """The images that training reads have the colours of their labels, and verify finds nothing."""
    index = Index.open(out, "train")
    images = Reader(index, "refuse", 64).read(np.arange(len(index)))
    assert images.pixels[:, 0, 0, 0].tolist() == index.label.tolist()
    done = nldist("verify", out, "--workers", 0)
    assert done.code == 0, done.out


def test_what_stock_webdataset_reads_is_read_alike(tmp_path: Path) -> None:
    members = [("__meta__", b"{}"), ("README", b"x"), ("._0.png", b"x"), (".DS_Store", b"x"), ("__own.x/1", b"x")]
    for number in range(4):
        members += [(f"./a/{number}.png", image_bytes(number)), (f"./a/{number}.txt", b"x")]
        members += [("._x.cls", b"9"), (f"./a/{number}.cls", b"%d" % number), (".DS_Store", b"x")]
    members += [("__dunder.png", image_bytes(4)), ("__dunder.cls", b"4"), ("__MACOSX/._0.png", b"x")]
    tar = write_tar(tmp_path / "t.tar", members)
    assert len(stock(tar)) == 5
    shard_well("webdataset", tar, tmp_path / "out")
    assert labels(tmp_path / "out") == stock(tar)
    check(tmp_path / "out")


def test_macos_files_beside_the_images_are_no_samples(tmp_path: Path) -> None:
    """As bsdtar of macOS packs a directory: ._NAME before each NAME, which ends stock WebDataset's sample."""
    members: list[Any] = []
    for number in range(3):
        for name, data in sample(f"it/{number}", number):
            members += [(f"it/._{Path(name).name}", b"\0\5\x16\7"), (f"__MACOSX/it/{name}", b"x"), (name, data)]
    shard_well("webdataset", write_tar(tmp_path / "t.tar", members), tmp_path / "out")
    assert labels(tmp_path / "out") == {"it/0": 0, "it/1": 1, "it/2": 2}
    check(tmp_path / "out")


@pytest.mark.parametrize("between", [[], sample("y", 2)])
def test_two_members_of_one_name_are_refused(tmp_path: Path, between: list[Any]) -> None:
    tar = write_tar(tmp_path / "t.tar", [*sample("x", 0), *between, *sample("x", 1), *sample("z", 3)])
    assert "it has two members x.png" in shard("webdataset", tar, tmp_path / "out").error
    shard_well("webdataset", tar, tmp_path / "out", "--on-bad", "skip")
    assert labels(tmp_path / "out") == {"z": 3} | ({"y": 2} if between else {})
    assert rejected(tmp_path / "out").keys() == {"x"}


def test_two_labels_or_names_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    members = [*sample("x", 0), ("x.CLS", b"1"), *sample("y", 1), ("y.PNG", image_bytes(2)), *sample("z", 3)]
    shard_well("webdataset", write_tar(tmp_path / "t.tar", members), tmp_path / "out", "--on-bad", "skip")
    assert labels(tmp_path / "out") == {"z": 3}
    assert rejected(tmp_path / "out") == {
        "x": "it has two members x.cls and x.CLS",
        "y": "it has two members y.png and y.PNG",
    }


def test_two_images_under_one_key_need_an_image_key(tmp_path: Path) -> None:
    members = [*sample("x", 0), ("x.jpg", image_bytes(1, "JPEG"))]
    tar, out = write_tar(tmp_path / "t.tar", members), tmp_path / "out"
    error = shard("webdataset", tar, out).error
    assert "2 images under one key (x.jpg, x.png): say which with --image-key" in error
    shard_well("webdataset", tar, out, "--image-key", ".PNG")
    assert labels(out) == {"x": 0}
    check(out)
    assert "image_key differ" in shard("webdataset", tar, out, "--image-key", "jpg").error


def test_an_image_with_a_longer_extension_is_read_where_it_is_the_only_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = write_tar(tmp_path / "1.tar", [*sample("x", 3, "input.png"), *sample("y", 4), ("y.mask.png", b"no image")])
    shard_well("webdataset", one, out / "one")
    assert labels(out / "one") == {"x": 3, "y": 4}
    check(out / "one")
    two = write_tar(tmp_path / "2.tar", [*sample("x", 3, "input.png"), ("x.target.png", image_bytes(5))])
    assert "(x.input.png, x.target.png)" in shard("webdataset", two, out / "two").error
    shard_well("webdataset", two, out / "two", "--image-key", "input.png")
    check(out / "two")


@pytest.mark.parametrize("parts", ["{000..003}", "{000,001,002,003}"])
def test_every_tar_of_a_range_must_exist(tmp_path: Path, parts: str) -> None:
    for number in (0, 1, 3):
        write_tar(tmp_path / f"t-{number:03d}.tar", sample(str(number), number))
    error = shard("webdataset", f"{tmp_path}/t-{parts}.tar", tmp_path / "out").error
    assert f"no file matches {tmp_path}/t-002.tar" in error
    shard_well("webdataset", f"{tmp_path}/t-*.tar", tmp_path / "out")
    assert labels(tmp_path / "out") == {"0": 0, "1": 1, "3": 3}
    assert "no file matches" in shard("webdataset", f"{tmp_path}/{{t,u}}-*.tar", tmp_path / "two").error


def test_members_that_are_not_adjacent_are_one_sample(tmp_path: Path) -> None:
    members = [member for number in range(3) for member in sample(f"k{number}", number)]
    tar = write_tar(tmp_path / "t.tar", sorted(members, key=lambda member: member[0][::-1]))
    assert stock(tar) == {}
    shard_well("webdataset", tar, tmp_path / "out")
    assert labels(tmp_path / "out") == {"k0": 0, "k1": 1, "k2": 2}
    check(tmp_path / "out")


def test_labels_nested_in_json(tmp_path: Path) -> None:
    texts = [
        b'{"meta": {"label": 1}}',
        b'{"meta.label": 2, "meta": {"label": 9}}',
        b'{"meta": {"label": 3}}',
        b"{}",
        b"3",
    ]
    members = [m for n, text in enumerate(texts) for m in ((f"{n}.png", image_bytes(n + 1)), (f"{n}.json", text))]
    tar, out = write_tar(tmp_path / "t.tar", members), tmp_path / "out"
    assert "there is json: --label-key ENTRY reads it" in shard("webdataset", tar, out).error
    shard_well("webdataset", tar, out, "--label-key", "meta.label", "--on-bad", "skip")
    assert labels(out) == {"0": 1, "1": 2, "2": 3}
    assert "no entry 'meta.label'" in rejected(out)["3"]
    check(out)


@pytest.mark.parametrize("name", ["a[1]", "a{b", "a*?", "a{0..1}"])
def test_signs_of_patterns_in_paths(tmp_path: Path, name: str) -> None:
    for number in range(2):
        write_tar(tmp_path / name / f"t-{number}.tar", sample(str(number), number))
    write_tar(tmp_path / "a1/t-0.tar", sample("9", 9))
    shard_well("webdataset", tmp_path / name / "t-1.tar", tmp_path / "one")
    assert labels(tmp_path / "one") == {"1": 1}
    if "{" in name:
        return
    shard_well("webdataset", tmp_path / name / "t-*.tar", tmp_path / "out")
    assert labels(tmp_path / "out") == {"0": 0, "1": 1}


def test_unbalanced_braces_are_told(tmp_path: Path) -> None:
    assert "nbalanced braces" in shard("webdataset", tmp_path / "t-{0..3.tar", tmp_path / "out").error


def test_tables_match_the_keys_of_a_tar_made_from_a_dot(tmp_path: Path) -> None:
    members = [member for number in range(3) for member in sample(f"./{number}/img", number)]
    out = tmp_path / "out"
    shard_well("webdataset", write_tar(tmp_path / "t.tar", members), out)
    assert labels(out) == {f"./{number}/img": number for number in range(3)}
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{number}/img.png,{2 - number}\n" for number in range(3)))
    assert nldist("noise", out, "--csv", tmp_path / "l.csv", "--name", "l").code == 0
    assert Index.open(out, "train").labels("l").tolist() == [2, 1, 0]


@pytest.mark.parametrize("kind", ["tar", "python"])
def test_second_names_of_images_have_the_image(tmp_path: Path, kind: str) -> None:
    """Hard and symbolic links, as GNU tar stores them."""
    raw = tmp_path / "raw"
    write_image(raw / "0.png", 0)
    write_image(raw / "z/1.png", 1)
    (raw / "0h.png").hardlink_to(raw / "0.png")
    (raw / "1s.png").symlink_to("z/1.png")
    (raw / "z/0s.png").symlink_to("../0.png")
    (raw / "2.png").symlink_to("gone.png")
    (raw / "3.png").symlink_to("3.png")
    for path in sorted(raw.rglob("*.png")):
        path.with_suffix(".cls").write_text(path.name[0])
    (raw / "z/0s.cls").unlink()
    (raw / "z/0s.cls").hardlink_to(raw / "0.cls")
    tar = tmp_path / "t.tar"
    names = [str(path.relative_to(raw)) for path in sorted(raw.rglob("*.*"))]
    if kind == "tar":
        subprocess.run(["tar", "-cf", tar, "-C", raw, *names], check=True)
    else:
        with tarfile.open(tar, "w") as out_tar:
            for name in names:
                out_tar.add(raw / name, name)
    shard_well("webdataset", tar, tmp_path / "out", "--on-bad", "skip")
    assert labels(tmp_path / "out") == {"0": 0, "0h": 0, "1s": 1, "z/0s": 0, "z/1": 1}
    assert "gone.png, which this tar does not hold" in rejected(tmp_path / "out")["2"]
    assert "3.png is a link to itself" in rejected(tmp_path / "out")["3"]
    check(tmp_path / "out")


def test_a_sparse_image_is_refused(tmp_path: Path) -> None:
    data = image_bytes(3) + b"\0" * 300_000
    (tmp_path / "0.png").write_bytes(data)
    (tmp_path / "0.cls").write_text("3")
    subprocess.run(["fallocate", "--dig-holes", tmp_path / "0.png"], check=False)
    subprocess.run(["tar", "-cSf", tmp_path / "t.tar", "-C", tmp_path, "0.png", "0.cls"], check=True)
    with tarfile.open(tmp_path / "t.tar") as tar:
        if not any(member.issparse() for member in tar):
            pytest.skip("this file system makes no holes")
    assert "stored as a sparse file" in shard("webdataset", tmp_path / "t.tar", tmp_path / "out").error


def test_dots_inside_file_names(tmp_path: Path) -> None:
    members = [member for number in range(3) for member in sample(f"n01440764.0000{number}", number)]
    tar, out = write_tar(tmp_path / "t.tar", members), tmp_path / "out"
    assert stock(tar) == {}
    error = shard("webdataset", tar, out).error
    assert "3 images under one key (n01440764.00000.png, n01440764.00001.png, n01440764.00002.png)" in error
    assert "--keys filename" in error
    shard_well("webdataset", tar, out, "--keys", "filename")
    assert labels(out) == {f"n01440764.0000{number}": number for number in range(3)}
    check(out)


def test_names_that_begin_with_a_dot_or_are_not_utf_8_lose_no_image_in_silence(tmp_path: Path) -> None:
    members = [*sample("x", 0), *sample("d/.hidden", 1), *sample("y\udcff", 2)]
    tar = write_tar(tmp_path / "t.tar", members, format=tarfile.GNU_FORMAT)
    shard_well("webdataset", tar, tmp_path / "out", "--on-bad", "skip")
    assert labels(tmp_path / "out") == {"x": 0}
    reasons = rejected(tmp_path / "out")
    assert "begins with a dot" in reasons["d/.hidden.png"]
    assert "not UTF-8" in reasons["y\\xff"]


def test_the_order_of_samples_is_that_of_the_tar(tmp_path: Path) -> None:
    order = [5, 2, 9, 0]
    tar = write_tar(tmp_path / "t.tar", [member for number in order for member in sample(f"{number}", number)])
    shard_well("webdataset", tar, tmp_path / "out")
    assert pq.read_table(tmp_path / "out/train/index.parquet")["label"].to_pylist() == order


def test_the_same_command_does_nothing_also_when_another_split_has_come(tmp_path: Path) -> None:
    tar, out = write_tar(tmp_path / "t.tar", [*sample("x", 0), *sample("y", 1)]), tmp_path / "out"
    for split in ("train", "test"):
        shard_well("webdataset", tar, out, split=split)
    for split in ("train", "test"):
        assert "already complete" in shard_well("webdataset", tar, out, split=split)
