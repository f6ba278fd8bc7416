"""Images by what a user names: files, directories, patterns, and tars with their members."""

import glob
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nldist.data.loose import Place
from nldist.data.make.keys import readable
from nldist.data.make.meaning import shown
from nldist.data.make.sources.base import is_clutter
from nldist.data.make.sources.folder import LeftOut, files_below
from nldist.errors import UserError

# Of what `normalise` reads, and so `nldist shard`.
_IMAGES: tuple[bytes, ...] = (b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".gif")
_IMAGES += (b".tif", b".tiff", b".ppm", b".pgm", b".pbm", b".pnm")
_TARS = (b".tar",)
_SHOWN = 6  # one more than is told


class Found:
    """The images of `names`, to be iterated over once; then `notes` say what was left out.

    A name is a file, whatever its extension; a directory, of which all images and tars count, with those of the
    directories in it; a tar, of which all images count; or a pattern with *, ? or [], where ** stands for any
    directories.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._left_out = names, LeftOut()
        self._num_others, self._others = 0, list[str]()  # neither images nor tars, and the first of them

    def __iter__(self) -> Iterator[Place]:
        """Raises UserError: there is no such file, a directory cannot be listed, or a tar is damaged."""
        for name in self._names:
            for path in _matching(name):
                yield from self._below(path) if os.path.isdir(path) else self._file(path)

    @property
    def notes(self) -> list[str]:
        """A line for each kind of what was left out."""
        notes = self._left_out.notes()
        if self._num_others:
            what = "files without an image's extension, and links in tars"
            notes.append(f"{self._num_others:,} {what}, were left out: {shown(self._others)}")
        return notes

    def _below(self, folder: bytes) -> Iterator[Place]:
        for path in files_below(folder, folder, self._left_out):
            full = os.path.normpath(os.path.join(folder, path))
            if full.lower().endswith(_IMAGES + _TARS):
                yield from self._file(full)
            else:
                self._leave(full)

    def _file(self, path: bytes) -> Iterator[Place]:
        if path.lower().endswith(_TARS):
            yield from self._members(path)
        else:
            yield Place(path)

    def _members(self, tar: bytes) -> Iterator[Place]:
        for info in _headers(tar):
            path = tar + b"/" + os.fsencode(info.name)
            if not path.lower().endswith(_IMAGES) or is_clutter(os.path.basename(info.name), False):
                continue  # labels and the like
            if info.isreg() and not info.issparse():
                yield Place(path, len(tar), info.offset_data, info.size)
            else:
                self._leave(path)

    def _leave(self, path: bytes) -> None:
        self._num_others += 1
        if len(self._others) < _SHOWN:
            self._others.append(readable(path))


def _matching(name: str) -> Iterable[bytes]:
    """The files or directories that a name stands for: itself, or, where there is none, what it is a pattern of."""
    if os.path.lexists(name):
        return [os.fsencode(name)]
    found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not found:
        more = ", nor any of this pattern" if glob.has_magic(name) else ""
        raise UserError(f"{name}: no such file or directory{more}")
    return map(os.fsencode, found)


def _headers(tar: bytes) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, of whose data nothing is read.

    Raises:
        UserError: it is no tar, a compressed one, or damaged.
    """
    path = Path(os.fsdecode(tar))
    try:
        with tarfile.open(path, "r:") as file:
            for info in file:
                yield info
                file.members = []  # type: ignore[attr-defined]
            end, stream = file.offset, file.fileobj
            assert stream is not None
            stream.seek(end)
            # tarfile takes a broken header for the end of the archive.
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no valid header at byte {end:,}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: no uncompressed tar, or a damaged one: {error}") from None
