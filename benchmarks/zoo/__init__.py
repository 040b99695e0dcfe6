"""The zoo: named architectures at real sizes with random weights, on which captures and races are measured.

Scripts in this folder say `from zoo import ENTRIES, entry`. `small=True` gives each architecture with its structure
kept and its widths shrunk, for tests.
"""

from __future__ import annotations

from . import convnets, handwritten, imaging, signals, text
from ._entry import Entry

ENTRIES: list[Entry] = [*convnets.ENTRIES, *imaging.ENTRIES, *text.ENTRIES, *handwritten.ENTRIES, *signals.ENTRIES]


def entry(name: str) -> Entry:
    """The entry of that name; LookupError with all names if there is none."""
    for one in ENTRIES:
        if one.name == name:
            return one
    raise LookupError(f"no {name!r} in the zoo; there are {', '.join(e.name for e in ENTRIES)}")


__all__ = ["ENTRIES", "Entry", "entry"]
