#!/usr/bin/env bash
# webdataset 1.0.2: a tar that tar itself makes of ordinary files can lose most of its samples, without a word.
#
# The guess: a sample is the files of one name but for the extension, and every file of a tar is in some sample. Seen:
# a key ends at the FIRST dot of a file's name, so n01440764.00001.jpg and n01440764.00002.jpg are parts of one sample
# "n01440764" with the extensions "00001.jpg" and "00002.jpg", which no decoder looks for as "jpg"; a link is left out,
# and GNU tar stores the second name of a file as one; and only neighbours are joined, so that "all .jpg, then all .cls"
# gives twice as many samples with half of their parts each. Output, 2026-11-27:
#
#     dots inside names         [('n01440764', ['00001.cls', '00001.jpg', '00002.cls', '00002.jpg'])]
#     two names of one file     [('first', ['cls', 'jpg']), ('second', ['cls'])]
#     images, then labels       [('a', ['jpg']), ('b', ['jpg']), ('a', ['cls']), ('b', ['cls'])]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy
cd "$work"
for name in n01440764.00001 n01440764.00002 a b first; do
    echo "image $name" > "$name.jpg"
    echo 0 > "$name.cls"
done
ln first.jpg second.jpg
echo 0 > second.cls
tar -cf dots.tar n01440764.00001.cls n01440764.00001.jpg n01440764.00002.cls n01440764.00002.jpg
tar -cf links.tar first.cls first.jpg second.cls second.jpg
tar -cf apart.tar a.jpg b.jpg a.cls b.cls
"$work/venv/bin/python" - <<'PY'
import importlib.metadata

import webdataset

found = {}
for name, what in (("dots", "dots inside names"), ("links", "two names of one file"), ("apart", "images, then labels")):
    samples = list(webdataset.WebDataset([f"{name}.tar"], shardshuffle=False))
    found[name] = [(s["__key__"], sorted(part for part in s if not part.startswith("__"))) for s in samples]
    print(f"{what:25} {found[name]}")
assert importlib.metadata.version("webdataset") == "1.0.2"
assert found["dots"] == [("n01440764", ["00001.cls", "00001.jpg", "00002.cls", "00002.jpg"])], "the behaviour has changed"
assert found["links"] == [("first", ["cls", "jpg"]), ("second", ["cls"])], "the behaviour has changed"
assert [key for key, _ in found["apart"]] == ["a", "b", "a", "b"], "the behaviour has changed"
PY
