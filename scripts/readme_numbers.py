"""Put the numbers of a `deepseek-r1 run digits` into both READMEs.

    python scripts/readme_numbers.py runs/digits/report.json

Keeps the report without its figures as docs/data/digits-report.json, rewrites the block between the `digits` markers
of README.md and README.zh-CN.md from it, and takes docs/images/report.png where there is a chromium.
"""

# ruff: noqa: RUF001 - Chinese has commas of its own
from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek_r1.core import Report, atomic
from deepseek_r1.core.report import format_value

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("docs/data/digits-report.json")
PICTURE = Path("docs/images/report.png")
READMES = {"README.md": "en", "README.zh-CN.md": "zh"}
BEGIN, END = "<!-- digits:begin -->", "<!-- digits:end -->"
_BLOCK = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)

_LINES = {
    "en": (
        "Measured on {day} on {cpu} with {cores} cores, {system}, torch {torch}, onnxruntime {onnxruntime}.\n"
        "*Before* is the float32 model in eager PyTorch, *after* is the artifact. Eager PyTorch against itself, which\n"
        "shows the noise of the clock, gave {noise}."
    ),
    "zh": (
        "测量于 {day}，{cpu}，{cores} 核，{system}，torch {torch}，onnxruntime {onnxruntime}。\n"
        "*before* 是即时执行的 PyTorch float32 模型，*after* 是导出的制品。PyTorch 与自身相比，{noise}，\n"
        "这就是计时的噪声。"
    ),
}
_AT_BATCH = {"en": "{ratio} at batch {size}", "zh": "批量 {size} 时 {ratio}"}


def strip(data: dict[str, Any]) -> dict[str, Any]:
    """The report without figures, here and in its sections."""
    return data | {"plots": [], "sections": [strip(s) for s in data["sections"]]}


def block(data: dict[str, Any], language: str) -> str:
    """What stands between the markers, markers included."""
    report = Report.from_dict(data)
    return f"{BEGIN}\n```text\n$ deepseek-r1 run digits\n{_shown(report)}\n```\n\n{_line(report, language)}\n{END}"


def _shown(report: Report) -> str:
    return "\n".join(line.rstrip() for line in str(report).splitlines())


def _line(report: Report, language: str) -> str:
    found = [s.facts["versions"] for s in report.sections if "versions" in s.facts]
    if not found:
        raise SystemExit("the report has no section with versions; give the report.json of `deepseek-r1 run digits`.")
    versions = dict(part.split(" ", 1) for part in found[0].split(", "))
    noise = {k.rpartition(" ")[2]: v for k, v in report.facts.items() if k.startswith("noise at batch")}
    ratios = {k: re.findall(r"[\d.]+x", v)[0] for k, v in noise.items()}
    parts = [_AT_BATCH[language].format(size=k, ratio=ratio) for k, ratio in ratios.items()]
    return _LINES[language].format(
        day=report.created[:10],
        cpu=report.facts["CPU"],
        cores=format_value(report.facts["cores"]),
        system=str(report.facts["system"]).partition(" ")[0],
        torch=versions["torch"],
        onnxruntime=versions["onnxruntime"],
        noise={"en": " and ", "zh": "、"}[language].join(parts),
    )


def put(text: str, new: str) -> str:
    """The README's text with a new block."""
    if len(_BLOCK.findall(text)) != 1:
        raise SystemExit(f"exactly one {BEGIN} ... {END} is needed.")
    return _BLOCK.sub(lambda _: new, text)


def picture(report: Report, path: Path) -> bool:
    """The upper part of the page (rows, checks, figures) as a PNG; False where there is no chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return False
    upper = replace(report, notes=[], facts={}, sections=[])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        upper.save(page)
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", f"--screenshot={shot}", "--window-size=1200,1800", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        atomic.write_bytes(path, _small(shot.read_bytes()))
    return True


def _small(png: bytes) -> bytes:
    """Cut off the empty lower part and keep 256 colours, rare ones too."""
    from PIL import Image, ImageChops

    image = Image.open(io.BytesIO(png)).convert("RGB")
    filled = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if filled is None:
        raise SystemExit("the screenshot is empty.")
    out = io.BytesIO()
    cut = image.crop((0, 0, image.width, min(image.height, filled[3] + 24)))
    cut.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """Do everything the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the report.json that `deepseek-r1 run digits` left")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    report = Report.load(options.report)
    if not report.ok:
        raise SystemExit(f"a check of {options.report} failed; the READMEs show good runs only.")
    data = strip(json.loads(options.report.read_text()))
    texts = {name: put((options.root / name).read_text(), block(data, words)) for name, words in READMES.items()}
    atomic.write_json(options.root / DATA, data)
    for name, text in texts.items():
        atomic.write_bytes(options.root / name, text.encode())
    done = report.plots and picture(report, options.root / PICTURE)
    print(f"wrote {', '.join([str(DATA), *texts, *([str(PICTURE)] if done else [])])}")
    if not done:
        print("the picture stays as it was: no chromium, or no figures in this report", file=sys.stderr)


if __name__ == "__main__":
    main()
