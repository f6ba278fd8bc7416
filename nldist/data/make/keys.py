"""Keys: the name of a sample that a data set gives a path, and how a table's paths find their samples."""

import re
import unicodedata
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc


def keys_of(paths: pa.Array) -> pa.Array:
    """The keys (large_string) of paths (large_binary) in ascending order.

    A key is the path without its extension, and with dots replaced, because WebDataset splits a name at the
    first dot. Where several images would share a key, all but the first get a number. WebDataset also skips
    names that begin with "__", so such a key gets a letter in front.
    """
    keys = pc.replace_substring_regex(pc.ascii_ltrim(_text(paths), "/"), r"([^/])\.[^./]*$", r"\1")
    keys = pc.replace_substring_regex(pc.replace_substring(keys, ".", "_"), "^__", "k__")
    return _distinct(keys)


def readable(path: bytes) -> str:
    """A file's name as text, whatever its bytes."""
    return path.decode("utf-8", "backslashreplace")


def plain(path: str) -> str:
    """A path of a table, or a key, in the form in which both are compared."""
    path = unicodedata.normalize("NFC", path.replace("\\", "/"))
    return re.sub(r"^(\.?/)+", "", path)


def matched(keys: Sequence[str]) -> list[str]:
    """Keys of samples in the form in which they are compared with those of a table's paths."""
    return [plain(key).replace(".", "_") for key in keys]


def _text(paths: pa.Array) -> pa.Array:
    try:
        return paths.cast(pa.large_string())
    except pa.ArrowInvalid:  # some name is not UTF-8
        return pa.array([readable(path) for path in paths.to_pylist()], pa.large_string())


def _distinct(keys: pa.Array) -> pa.Array:
    if pc.count_distinct(keys).as_py() == len(keys):
        return keys
    names = keys.to_pylist()
    taken, seen = set(names), set()
    for position, name in enumerate(names):
        number = 1
        while name in seen or (number > 1 and name in taken):
            number += 1
            name = f"{names[position]}-{number}"
        seen.add(name)
        names[position] = name
    return pa.array(names, pa.large_string())
