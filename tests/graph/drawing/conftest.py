"""Models to draw, and a browser to look at the drawings with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch
from torch import nn

from deepseek_r1.graph import trace

#: Nothing that a page does may need the network, so the browser gets none.
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """A small network with a residual block inside of a block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Branching(nn.Module):
    """Both kinds of control flow, and results of several kinds."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        a, b = torch.cond(x.sum() > 0, lambda x: (self.fc(x).sin(), x * 2), lambda x: (x.cos(), x + 1), (x,))
        i, y = torch._higher_order_ops.while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, self.fc(y).relu()), (torch.tensor(0), b)
        )
        left, right = torch.split(y, 2, 1)
        return {"a": a, "pair": (left, right), "steps": i, "none": None}


@pytest.fixture(scope="session")
def drawing():
    torch.manual_seed(0)
    return trace(Net(), torch.randn(1, 1, 8, 8), rounds=3)


@pytest.fixture(scope="session")
def branching():
    torch.manual_seed(0)
    return trace(Branching(), torch.ones(3, 4), rounds=3)


def _chromium(folder, *arguments):
    command = [BROWSER, *QUIET, f"--user-data-dir={folder}/profile", *arguments]
    return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser():
    """The path of a chromium; skips where there is none."""
    if BROWSER is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    return BROWSER


@pytest.fixture
def in_browser(browser, tmp_path):
    """Opens a page, runs a script in it after the page's own, and gives what the script returns."""

    def run(page, script, size="1600,1000"):
        told = f"<script>{{const told=(()=>{{{script}}})();const out=document.createElement('pre');out.id='told';"
        told += "out.textContent=JSON.stringify(told);document.body.append(out);}</script>"
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body></html>", f"{told}</body></html>"))
        dom = _chromium(tmp_path, f"--window-size={size}", "--dump-dom", file.as_uri())
        match = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
        assert match, "the page's script failed"
        return json.loads(unescape(match[1]))

    return run


@pytest.fixture
def screenshot(browser, tmp_path):
    """A picture of a page as an array [height, width, 3]."""
    image = pytest.importorskip("PIL.Image")
    import numpy as np

    def take(page, size=(1600, 1000)):
        file, shot = tmp_path / "shown.html", tmp_path / "shown.png"
        file.write_text(page)
        _chromium(tmp_path, f"--window-size={size[0]},{size[1]}", f"--screenshot={shot}", file.as_uri())
        return np.asarray(image.open(shot).convert("RGB"))

    return take
