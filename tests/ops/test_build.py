"""Building: the compiler's errors, missing compilers, other machines, CUDA, and the command."""

import shutil
import struct
import subprocess

import pytest
from typer.testing import CliRunner

from deepseek_r1 import ops
from deepseek_r1.cli import app
from deepseek_r1.core import InputError
from deepseek_r1.ops import BuildError, MissingCompilerError
from deepseek_r1.ops._build import plan
from deepseek_r1.ops._library import machine_of

from .conftest import EXAMPLES, HERE

SOURCE = EXAMPLES / "swish.cc"
PLAIN = {"cuda": False, "target": None, "march": None, "compiler": None, "flags": ()}


@pytest.fixture
def broken(tmp_path, compiler):
    path = tmp_path / "broken.cc"
    path.write_text(SOURCE.read_text().replace("expf(-input)", "expp(-input)"))
    return path


def test_an_error_names_the_line_and_shows_it(broken):
    with pytest.raises(BuildError) as caught:
        ops.build_op(broken)
    text = str(caught.value)
    assert f"{broken}:7:" in text
    assert "expp" in text
    assert "output = input *" in text
    assert not broken.with_suffix(".so").exists()
    assert [p.name for p in broken.parent.iterdir()] == ["broken.cc"], "nothing half-written is left"


def test_an_old_library_survives_a_failed_build(broken):
    old = broken.with_suffix(".so")
    old.write_bytes(b"as it was")
    with pytest.raises(BuildError):
        ops.build_op(broken)
    assert old.read_bytes() == b"as it was"


def test_a_wrong_assignment_is_explained(tmp_path, compiler):
    path = tmp_path / "text.cc"
    path.write_text(SOURCE.read_text().replace("input * (1.0f / (1.0f + expf(-input)))", '"words"'))
    with pytest.raises(
        BuildError, match="only expressions of tensors and numbers can be assigned to a tensor"
    ) as caught:
        ops.build_op(path)
    assert "asked for by" in str(caught.value)
    assert "text.cc:7" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nothing.cc"}, "does not exist or is no file"),
        ({"source": HERE / "conftest.py"}, "a C\\+\\+ source ends in .cc"),
        ({"target": "mips"}, "one of x86_64, aarch64 is needed"),
        ({"target": "aarch64", "cuda": True}, "exclude it"),
        ({"output": HERE}, "cannot be written to"),
        ({"output": SOURCE}, "cannot be written to"),
    ],
)
def test_wrong_arguments(change, message, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(InputError, match=message):
        ops.build_op(**{"source": SOURCE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"no g\+\+ or clang\+\+ or c\+\+ on the PATH.*apt-get install g\+\+"),
        ({"target": "aarch64"}, r"no aarch64-linux-gnu-g\+\+ on the PATH.*g\+\+-aarch64-linux-gnu"),
        ({"compiler": "my-cc"}, "no my-cc on the PATH"),
    ],
)
def test_a_missing_compiler_is_named_with_its_package(change, message, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(MissingCompilerError, match=message):
        ops.build_op(SOURCE, tmp_path / "x.so", **change)


def test_the_command_for_this_machine_and_for_others(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    own = plan(SOURCE, None, **PLAIN)
    assert own.output == SOURCE.with_suffix(".so")
    assert {"-march=native", "-O3", "-std=c++17", "-shared"} <= set(own.command)
    assert "-ffast-math" not in own.command
    assert "-march=x86-64-v3" in plan(SOURCE, None, **{**PLAIN, "march": "x86-64-v3"}).command
    cross = plan(SOURCE, None, **{**PLAIN, "target": "aarch64"}).command
    assert cross[0] == "/bin/aarch64-linux-gnu-g++"
    assert not any(a.startswith("-march") for a in cross)
    cuda = plan(SOURCE, None, **{**PLAIN, "cuda": True, "march": "sm_90"}).command
    assert cuda[0] == "/bin/nvcc"
    assert "-arch=sm_90" in cuda
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert "-mcpu=native" in plan(SOURCE, None, **{**PLAIN, "target": "aarch64"}).command


def test_the_command_line(tmp_path, compiler):
    source, out = tmp_path / "same.cc", tmp_path / "library.so"
    text = SOURCE.read_text().replace('"swish"', '"same"')
    source.write_text(text.replace("input * (1.0f / (1.0f + expf(-input)))", "input"))
    done = CliRunner().invoke(app, ["build-op", str(source), "--out", str(out), "--json", "-"])
    assert done.exit_code == 0, done.output
    assert '"operator same"' in done.stdout
    assert [about.name for about in ops.describe(out)] == ["same"]


def test_the_command_line_on_a_source_that_is_wrong(broken):
    done = CliRunner().invoke(app, ["build-op", str(broken)])
    assert done.exit_code == 2
    assert "broken.cc:7:" in done.stderr
    assert "Traceback" not in done.stderr


HOST = """
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <deepseek_r1/core/abi.h>
int main(int count, char** words) {
  void* library = dlopen(words[1], RTLD_NOW);
  if (!library) return puts(dlerror()), 2;
  int (*run)(const dr1_call*) = (int (*)(const dr1_call*))dlsym(library, "dr1_op_run");
  static float in[1001], out[1001];
  for (int i = 0; i < 1001; ++i) in[i] = (i - 500) * 0.05f;
  dr1_tensor tensors[2];
  memset(tensors, 0, sizeof tensors);
  for (int k = 0; k < 2; ++k) {
    tensors[k].data = k ? out : in;
    tensors[k].ndim = tensors[k].strides[0] = 1;
    tensors[k].sizes[0] = 1001;
  }
  char error[256] = "";
  dr1_context context = {0, 0, 0, 0, 2, 0};
  dr1_call call = {0, DR1_FORWARD, &context, 0, tensors, 2, error, sizeof error};
  if (run(&call)) return puts(error), 3;
  double worst = 0;
  for (int i = 0; i < 1001; ++i) {
    double right = in[i] / (1 + exp(-(double)in[i]));
    worst = fmax(worst, fabs(out[i] - right) / (fabs(right) + 1e-6));
  }
  printf("%g", worst);
  return 0;
}
"""


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="no g++-aarch64-linux-gnu to cross-compile with"
)
def test_for_arm_with_neon(tmp_path):
    library = ops.build_op(SOURCE, tmp_path / "swish.so", target="aarch64")
    assert machine_of(library) == "aarch64"
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    # Arithmetic on four floats at a time, the fused ones of the polynomial among it.
    assert code.count(".4s") > 50
    assert "fmla" in code or "fmls" in code
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        return
    (tmp_path / "host.c").write_text(HOST)
    build = [
        "aarch64-linux-gnu-gcc",
        "-I",
        ops.include_dir(),
        tmp_path / "host.c",
        "-o",
        tmp_path / "host",
        "-ldl",
        "-lm",
    ]
    subprocess.run(build, check=True)
    run = [emulator, "-L", "/usr/aarch64-linux-gnu", tmp_path / "host", library]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout) < 1e-6


def on_vectors(code, operation):
    """Whether `operation` runs on registers of 32 or 64 bytes somewhere."""
    return any(operation in line and ("%zmm" in line or "%ymm" in line) for line in code.splitlines())


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_loop_is_vector_code(built):
    library = built("swish")
    if machine_of(library) != "x86_64":
        pytest.skip("the registers' names are those of x86-64")
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert on_vectors(code, "divps"), "the division of the swish runs on whole vectors"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "expf" not in symbols, "the exponential of floats is in the loop, not in the C library"


@pytest.mark.slow  # nvcc compiles a dozen kernels
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_nvcc_makes_a_kernel_of_the_same_source(tmp_path):
    library = ops.build_op(SOURCE, tmp_path / "swish.so", cuda=True, march="sm_90")
    (about,) = ops.describe(library)
    assert about.devices == ("cpu", "cuda")
    magic = struct.pack("<I", 0xBA55ED50)
    assert magic in library.read_bytes(), "there is GPU code in it"
