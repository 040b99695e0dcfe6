"""The pictures of docs/trace.md are small, whole, and say nothing of the machine that took them."""

import struct
from pathlib import Path
from xml.etree import ElementTree

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


def test_the_page_is_a_small_png():
    data = (IMAGES / "trace-bert.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) < 200_000
    assert struct.unpack(">II", data[16:24]) == (1440, 1000)


def test_the_picture_is_a_small_svg():
    text = (IMAGES / "trace-digits.svg").read_text()
    root = ElementTree.fromstring(text)
    assert len(text) < 30_000
    assert float(root.get("height")) < 1400
    words = {"".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"DigitsNet", "conv2d 0"} <= words
    assert "/" not in "".join(words)
