"""The page for users runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_blocks_of_the_page_run_in_order(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 9
    namespace: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name} block {number + 1}", "exec"), namespace)
    assert "layer '1' (Log) is the first that is not finite" in capsys.readouterr().out
