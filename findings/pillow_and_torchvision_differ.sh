#!/usr/bin/env bash
# Pillow 13.0.0 and torchvision 0.29.2: neither reads all that the other reads, not even of JPEG, and they turn images by
# different rules.
#
# The guess: both wrap libjpeg, libpng and libwebp, so for JPEG, PNG and WebP one may check files for the other. Seen: an
# animated WebP, which Pillow reads, is refused by torchvision's decode_image, and so are BMP and TIFF; a WebP (and a JPEG
# or PNG that says so in XMP only) that is to be turned is turned by Pillow's exif_transpose, but not by torchvision's
# apply_exif_orientation, so that height and width are exchanged. Output, 2026-11-27 (height, width):
#
#     JPEG, EXIF says turn      Pillow (40, 24)  torchvision (40, 24)
#     JPEG, XMP says turn       Pillow (40, 24)  torchvision (24, 40)
#     WebP, EXIF says turn      Pillow (40, 24)  torchvision (24, 40)
#     WebP, animated            Pillow (24, 40)  torchvision refuses
#     BMP                       Pillow (24, 40)  torchvision refuses
#
# Who indexes sizes with one and trains with the other loses such images in every epoch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" torch==2.15.0 torchvision==0.29.2 pillow==13.0.0 numpy
"$work/venv/bin/python" - <<'PY'
import io

import PIL
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

image = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
turned = Image.Exif()
turned[0x0112] = 6
xmp = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
cases = {
    "JPEG, EXIF says turn": ("JPEG", {"exif": turned}),
    "JPEG, XMP says turn": ("JPEG", {"xmp": xmp}),
    "WebP, EXIF says turn": ("WEBP", {"exif": turned}),
    "WebP, animated": ("WEBP", {"save_all": True, "append_images": [image.rotate(180)]}),
    "BMP": ("BMP", {}),
}
found = {}
for name, (kind, options) in cases.items():
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = bytearray(buffer.getvalue())
    width, height = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    try:
        pixels = decode_image(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True)
        theirs = str(tuple(pixels.shape[1:]))
    except RuntimeError:
        theirs = "refuses"
    found[name] = ((height, width), theirs)
    print(f"{name:25} Pillow {(height, width)}  torchvision {theirs}")
assert PIL.__version__ == "13.0.0"
assert torchvision.__version__.startswith("0.29.2")
assert [theirs for _, theirs in found.values()] == ["(40, 24)", "(24, 40)", "(24, 40)", "refuses", "refuses"]
assert [ours for ours, _ in found.values()] == [(40, 24)] * 3 + [(24, 40)] * 2, "the behaviour has changed"
PY
