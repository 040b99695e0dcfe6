"""For the reference pages: sources say `Example:` over a doctest; Google's form, which griffe reads, is `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class HouseExamples(griffe.Extension):
    """Renames that one section while the sources are read; the sources stay as they are."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
