"""What an image file says of itself before anything is decoded: a few kilobytes may claim to be gigabytes of pixels."""

from typing import NamedTuple

MAX_PIXELS = 2**26
"""Most pixels of an image: 67 million, twice an 8K frame."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG, each of which goes over all pixels; 10 are usual."""

PNG = b"\x89PNG\r\n\x1a\n"
NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
"""Markers of JPEG that stand alone."""
FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Markers of the JPEG frames that libjpeg decodes: baseline, extended and progressive, Huffman or arithmetic."""
OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
START_OF_SCAN = 0xDA


class Header(NamedTuple):
    """An image, by its header."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    bits: int
    """Of a channel."""


def read_header(data: bytes) -> Header:
    """The header of a JPEG or PNG.

    Raises:
        ValueError: it is neither, or one that is not decoded: too many pixels or scans, or more than 8 bits a channel.
    """
    if data.startswith(PNG):
        header = _png(data)
    elif data.startswith(b"\xff\xd8"):
        header = _jpeg(data)
    else:
        raise ValueError("neither a JPEG nor a PNG")
    if header.bits > 8:
        raise ValueError(f"{header.bits} bits a channel, expected 8")
    if not 0 < header.width * header.height <= MAX_PIXELS:
        raise ValueError(f"{header.width}×{header.height} pixels, expected 1 to {MAX_PIXELS}")
    return header


def _png(data: bytes) -> Header:
    if len(data) < 33 or data[8:16] != b"\x00\x00\x00\rIHDR":
        raise ValueError("a PNG without a header")
    return Header(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), data[24])


def _jpeg(data: bytes) -> Header:
    """Goes from marker to marker as libjpeg does, up to the first scan; its frame has to stand before."""
    header, at = None, 2
    while True:
        at = data.find(b"\xff", at)
        while 0 <= at < len(data) and data[at] == 0xFF:
            at += 1
        if not 0 < at < len(data):
            raise ValueError("a JPEG without an image")
        marker, at = data[at], at + 1
        if marker == 0 or marker in NO_LENGTH:  # 0: no marker, but a stuffed byte
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or marker in (0xD8, 0xD9) or marker in OTHER_FRAMES:
            raise ValueError("a damaged JPEG, or of a kind that is not decoded")
        if marker == START_OF_SCAN:
            break
        if marker in FRAMES:
            if header is not None or length < 8:
                raise ValueError("a JPEG with a damaged header")
            bits, height, width = data[at + 2], data[at + 3 : at + 5], data[at + 5 : at + 7]
            header = Header(int.from_bytes(width, "big"), int.from_bytes(height, "big"), bits)
        at += length
    if header is None:
        raise ValueError("a JPEG without a header")
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
    return header
