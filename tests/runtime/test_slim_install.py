"""The wheel in an environment with numpy, onnxruntime, rich and typer, and no torch."""

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
WANTED = ("numpy", "onnxruntime", "rich", "typer")


def closure(names):
    """The distributions behind these names and everything they need, extras left out."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name.lower() in found:
            continue
        found[name.lower()] = one = metadata.distribution(name)
        needs = [Requirement(text) for text in one.requires or ()]
        todo += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """The `bin` directory of a fresh environment with the wheel and its torch-free dependencies."""
    folder = tmp_path_factory.mktemp("slim")
    tree = folder / "tree"
    tree.mkdir()
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(tree)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    linked = folder / "linked"
    linked.mkdir()
    for one in closure(WANTED):
        tops = {file.parts[0] for file in one.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            source = Path(str(one.locate_file(top)))
            if source.exists() and not (linked / top).exists():
                (linked / top).symlink_to(source)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "linked.pth").write_text(str(linked))
    return python.parent


def run(slim, *command, code=0):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(slim / command[0]), *command[1:]], capture_output=True, text=True, timeout=60, env=environment, cwd=slim
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_torch_is_not_there_and_the_package_is(slim):
    code = "import deepseek_r1, sys; print(deepseek_r1.__file__, deepseek_r1.__version__, 'torch' in sys.modules)"
    where, version, has_torch = run(slim, "python", "-W", "error", "-c", code).split()
    assert where.startswith(str(slim.parent))
    assert version == metadata.version("deepseek-r1")
    assert has_torch == "False"
    for name in ("torch", "onnx", "scipy", "sklearn", "safetensors"):
        run(slim, "python", "-c", f"import {name}", code=1)


def test_what_needs_torch_says_so(slim):
    code = "import deepseek_r1\ntry: deepseek_r1.Trainer\nexcept ImportError as e: print(e)"
    assert "torch" in run(slim, "python", "-c", code)


def test_the_commands_answer(slim):
    assert "run" in run(slim, "deepseek-r1", "--help")
    verdicts = json.loads(run(slim, "ds-doctor", "--json", "-"))
    text = json.dumps(verdicts)
    assert "torch" in text
    assert "onnxruntime" in text


def test_a_digits_artifact_is_loaded_and_predicts(slim, digits_artifact, tmp_path):
    path, raw, expected = digits_artifact
    np.save(tmp_path / "raw.npy", raw)
    code = (
        "import sys, numpy as np, deepseek_r1 as dr1\n"
        "predictor = dr1.load_artifact(sys.argv[1])\n"
        "print(','.join(predictor.predict(np.load(sys.argv[2]))))\n"
        "assert 'torch' not in sys.modules\n"
    )
    out = run(slim, "python", "-W", "error", "-c", code, str(path), str(tmp_path / "raw.npy"))
    assert out.strip().split(",") == expected
