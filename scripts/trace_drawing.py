"""Draw the pictures of docs/trace.md.

    python scripts/trace_drawing.py

Writes docs/images/trace-digits.svg (the network of the digits recipe, one level open) and, where there is
a chromium, docs/images/trace-bert.png (the page of a BERT-base with random weights, one layer opened).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import deepseek_r1 as dr1
from deepseek_r1.core import atomic
from deepseek_r1.models import DigitsNet

ROOT = Path(__file__).resolve().parents[1]
PICTURE, PAGE = Path("docs/images/trace-digits.svg"), Path("docs/images/trace-bert.png")
#: Done in the page before the picture is taken: open the first layer, choose its largest product, look at it.
_POSE = """
for (const item of ITEMS.values())
  if (item.isGroup && item.group.path.startsWith("encoder.layer.0")) state.open.add(item.group.id);
state.open.delete("L__self__embeddings");
draw(); fit(0.85);
const chosen = [...ITEMS.values()].find((i) => !i.isGroup && i.node.module === "encoder.layer.0.attention.self.key");
select(chosen);
const spot = shown.get(chosen.key);
state.k = 0.8; state.y = 300 - spot.y * state.k; state.x = 480 - spot.x * state.k; view();
"""


def digits() -> dr1.Drawing:
    """The network of the digits recipe."""
    dr1.seed_everything(0)
    return dr1.trace(DigitsNet(), torch.randn(1, 1, 8, 8), rounds=50)


def bert() -> dr1.Drawing:
    """A BERT-base with random weights, 128 tokens."""
    from transformers import BertConfig, BertModel

    dr1.seed_everything(0)
    ids = torch.randint(0, 30_000, (1, 128))
    drawing = dr1.trace(BertModel(BertConfig()).eval(), {"input_ids": ids}, rounds=12, max_seconds=10)
    # Where the packages lie on the machine that took the picture is nobody's business.
    plain = (replace(n, source=n.source.rpartition("site-packages/")[2]) for n in drawing.nodes)
    return replace(drawing, nodes=tuple(plain))


def photograph(page: str, path: Path) -> bool:
    """A picture of the posed page; False where there is no chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        file.write_text(page.replace("</body></html>", f"<script>{{{_POSE}}}</script></body></html>"))
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", f"--screenshot={shot}", "--window-size=1440,1000", file.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        atomic.write_bytes(path, shot.read_bytes())
    return True


def main(arguments: list[str] | None = None) -> None:
    """Do everything the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    atomic.write_bytes(options.root / PICTURE, digits().svg(expand=1).encode())
    print(f"wrote {PICTURE}")
    if photograph(bert().html(), options.root / PAGE):
        print(f"wrote {PAGE}")
    else:
        print("the page's picture stays as it was: there is no chromium", file=sys.stderr)


if __name__ == "__main__":
    main()
