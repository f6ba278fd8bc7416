"""What a JPEG's markers say, read without decoding it."""

BEGIN, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
HUFFMAN = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive: all but a few of the JPEGs that there are
ARITHMETIC = {0xC9, 0xCA}
LOSSLESS = {0xC3, 0xCB}


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
