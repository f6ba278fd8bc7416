"""What a JPEG's markers say, read without decoding it."""

BEGIN, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
HUFFMAN = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive: all but a few of the JPEGs that there are
ARITHMETIC = {0xC9, 0xCA}
LOSSLESS = {0xC3, 0xCB}
SCAN, EXIF = b"\xff\xda", b"\xff\xe1"
_UNCOMMON = FRAMES - HUFFMAN | {EXIF[1], 0xFF}  # which may fill the space between segments


def is_whole(raw: bytes) -> bool:
    """Whether a file begins and ends as a JPEG does; zeros may be behind it."""
    return raw[:2] == BEGIN and raw.rstrip(b"\0").endswith(END)


def frame(raw: bytes) -> int:
    """The marker of a JPEG's frame, which tells its process of coding; 0 if there is none."""
    place = 2
    while raw[:2] == BEGIN and place + 4 <= len(raw) and raw[place] == 0xFF:
        marker = raw[place + 1]
        if marker in FRAMES:
            return marker
        place += 1 if marker == 0xFF else 2 + int.from_bytes(raw[place + 2 : place + 4], "big")
    return 0


def is_common(data: bytes) -> bool:
    """Whether it is a JPEG of a common process, grey or of three colours, in whose header there is no EXIF block."""
    place, end = 2, len(data) - 10
    if end < 0 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    while place <= end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in HUFFMAN:  # the block belongs before the frame, but libjpeg heeds it up to the scan
            return data[place + 9] in (1, 3) and data.find(EXIF, place, data.find(SCAN, place)) < 0
        if marker in _UNCOMMON:
            return False
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    return False
