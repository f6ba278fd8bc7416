"""How an image is turned, by its EXIF block."""

from typing import Any

from PIL import Image

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an orientation upright; of any other it is."""


def orientation(image: Image.Image) -> Any:
    """The entry, 1 if there is none, None if the block is broken: viewers ignore it then."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return None
