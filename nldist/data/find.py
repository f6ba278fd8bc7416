"""Images by what a user names: files, directories, patterns, and tars with their members."""

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
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
    directories: of what it matches the images and tars, or, where that is directories alone, those in them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._left_out = names, LeftOut()
        self._num_others, self._others = 0, list[str]()  # neither images nor tars, and the first of them

    def __iter__(self) -> Iterator[Place]:
        """Raises UserError: there is no such file, a directory cannot be listed, or a tar is damaged."""
        for name in self._names:
            if os.path.isdir(name):
                yield from self._below(os.fsencode(name))
            elif os.path.lexists(name):
                yield from self._file(os.fsencode(name))
            else:
                yield from self._matching(name)

    @property
    def notes(self) -> list[str]:
        """A line for each kind of what was left out."""
        notes = self._left_out.notes()
        if self._num_others:
            what = "files without an image's extension, and links in tars"
            notes.append(f"{self._num_others:,} {what}, were left out: {shown(self._others)}")
        return notes

    def _matching(self, pattern: str) -> Iterator[Place]:
        """Files of a pattern; directories only where it matches nothing else, so that no image comes twice."""
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []
        if not found:
            more = ", nor any of this pattern" if glob.has_magic(pattern) else ""
            raise UserError(f"{pattern}: no such file or directory{more}")
        files = [path for path in found if not os.path.isdir(path)]
        for path in map(os.fsencode, files):
            yield from self._known(path)
        for path in map(os.fsencode, () if files else found):
            yield from self._below(path)

    def _below(self, folder: bytes) -> Iterator[Place]:
        for path in files_below(folder, folder, self._left_out):
            yield from self._known(os.path.normpath(os.path.join(folder, path)))

    def _known(self, path: bytes) -> Iterator[Place]:
        """An image or a tar by its extension; others are left out."""
        if path.lower().endswith(_IMAGES + _TARS):
            yield from self._file(path)
        else:
            self._leave(path)

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
