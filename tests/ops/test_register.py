"""Registration: names, the same file again, and libraries that are wrong in every way."""

import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek_r1 as dr1
from deepseek_r1.core import InputError
from deepseek_r1.ops import _register
from deepseek_r1.ops._library import Library, check_file, parse_description
from deepseek_r1.ops._shapes import output_shapes

GOOD = """
unsigned dr1_abi_version(void) { return VERSION; }
unsigned dr1_op_count(void) { return 1; }
const char* dr1_op_describe(unsigned op) { return TEXT; }
int dr1_op_shape(void) { return 1; }
int dr1_op_run(void* call) { return 1; }
"""
TEXT = (
    r'"{\"name\": \"NAME\", \"inputs\": 1, \"outputs\": 1, \"attributes\": [], \"backward\": false, '
    r'\"shape\": false, \"dtypes\": [\"float32\"], \"output_dtype\": null, \"devices\": [\"cpu\"]}"'
)


@pytest.fixture
def c_library(tmp_path, compiler):
    """A library of plain C with these functions."""

    def make(source, name="library"):
        (tmp_path / f"{name}.c").write_text(source)
        out = tmp_path / f"{name}.so"
        subprocess.run([shutil.which("gcc") or "cc", "-shared", "-fPIC", tmp_path / f"{name}.c", "-o", out], check=True)
        return out

    return make


ODD = TEXT.replace("NAME", "odd_one")


def of(version=1, text=ODD, without=""):
    lines = [line for line in GOOD.splitlines() if not without or without not in line]
    return "\n".join(lines).replace("VERSION", str(version)).replace("TEXT", text)


def test_the_same_file_again_does_nothing(swish, built, tmp_path):
    assert dr1.ops.register_custom_op("swish", built("swish")) is swish
    link = tmp_path / "link.so"
    link.symlink_to(built("swish"))
    assert dr1.ops.register_custom_op("swish", str(link)) is swish
    assert dr1.ops.libraries()["swish"] == built("swish").resolve()


def test_another_file_for_the_same_name(swish, built, tmp_path):
    other = shutil.copy(built("swish"), tmp_path / "other.so")
    with pytest.raises(InputError, match=r"registered from .*swish\.so already, not from .*other\.so"):
        dr1.ops.register_custom_op("swish", other)


def test_a_file_that_changed_after_it_was_loaded(c_library, tmp_path):
    path = c_library(of(text=TEXT.replace("NAME", "changing_one")))
    dr1.ops.register_custom_op("changing_one", path)
    # In the place of the old file: the one that is loaded must stay whole until this process ends.
    (tmp_path / "next").write_bytes(path.read_bytes() + b"x")
    (tmp_path / "next").replace(path)
    with pytest.raises(InputError, match=r"was changed or removed after it was loaded.*new\s+process"):
        dr1.ops.register_custom_op("changing_one", path)
    path.unlink()
    with pytest.raises(InputError, match="was changed or removed"):
        dr1.ops.register_custom_op("changing_one", path)


def test_an_operator_that_the_library_does_not_have(swish, built):
    with pytest.raises(InputError, match="has no operator 'swosh'; it has swish"):
        dr1.ops.register_custom_op("swosh", built("swish"))
    assert not hasattr(dr1.ops, "Swosh")


def test_names_before_registration():
    with pytest.raises(AttributeError, match=r"no attribute 'NothingLikeIt'; an operator is there after register_cus"):
        dr1.ops.NothingLikeIt
    assert not hasattr(dr1.ops, "__wrapped__")


def test_names_that_would_clash(c_library, monkeypatch):
    path = c_library(of(text=TEXT.replace("NAME", "clash_one")))
    dr1.ops.register_custom_op("clash_one", path)
    other = c_library(of(text=TEXT.replace("NAME", "clash__one")), "other")
    with pytest.raises(InputError, match="'clash__one' and 'clash_one' would both be ClashOne"):
        dr1.ops.register_custom_op("clash__one", other)
    monkeypatch.delitem(_register._OPS, "clash_one")
    with pytest.raises(InputError, match="torch has an operator dr1::clash_one already"):
        dr1.ops.register_custom_op("clash_one", path)


@pytest.mark.parametrize("missing", ["dr1_abi_version", "dr1_op_run", "dr1_op_describe"])
def test_a_missing_symbol(c_library, missing):
    with pytest.raises(InputError, match=f"no library of operators: it has no {missing}. Include"):
        Library(c_library(of(without=missing)))


@pytest.mark.parametrize("version", [0, 2, 4_000_000_000])
def test_another_abi_version(c_library, version):
    with pytest.raises(
        InputError, match=f"ABI version {version}; this release of deepseek-r1 runs version 1. Build it"
    ):
        Library(c_library(of(version)))


@pytest.mark.parametrize(
    "text",
    ["0", '"no json"', '"{}"', TEXT.replace("NAME", "Bad Name"), TEXT.replace("NAME", "x").replace("float32", "f")],
)
def test_a_description_that_is_none(c_library, text):
    with pytest.raises(InputError, match="operator 0 does not describe itself rightly"):
        Library(c_library(of(text=text)))


def test_what_is_no_library(tmp_path):
    with pytest.raises(InputError, match="does not exist or is no file; build it with"):
        Library(tmp_path / "nothing.so")
    with pytest.raises(InputError, match="does not exist or is no file"):
        Library(tmp_path)
    for content, message in (
        (b"#!/bin/sh\n", "no ELF file"),
        (b"", "no ELF file"),
        (b"\x7fELF\x02\x01", "truncated"),
        (b"\x7fELF\x01\x01" + bytes(80), "no 64-bit"),
    ):
        (tmp_path / "wrong.so").write_bytes(content)
        with pytest.raises(InputError, match=message):
            Library(tmp_path / "wrong.so")


def test_a_library_for_another_machine(built, tmp_path):
    data = bytearray(built("swish").read_bytes())
    data[18:20] = (243).to_bytes(2, "little")
    (tmp_path / "risc.so").write_bytes(data)
    with pytest.raises(InputError, match="was built for riscv64, this machine is"):
        Library(tmp_path / "risc.so")


def test_a_truncated_library_is_an_error_wherever_it_ends(built, tmp_path):
    # In a process of its own: what is tested is that the loader does not take it down.
    code = f"""
import pathlib, sys
from deepseek_r1.core import InputError
from deepseek_r1.ops._library import Library
data = pathlib.Path({str(built("swish"))!r}).read_bytes()
file = pathlib.Path({str(tmp_path)!r}) / "cut.so"
for part in range(1, 40):
    file.write_bytes(data[: len(data) * part // 45])
    try:
        Library(file)
    except InputError as e:
        print(part, e)
    file.unlink()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 39, done.stdout


def test_a_missing_dependency_is_an_error(c_library, tmp_path):
    path = c_library(of().replace("return 1; }", "return nobody_has_this(); }", 1) + "\nint nobody_has_this(void);")
    with pytest.raises(InputError, match=r"could not be loaded: .*nobody_has_this"):
        Library(path)


def test_what_an_operator_throws_becomes_an_error(c_library):
    path = c_library(of(text=TEXT.replace("NAME", "failing_one")))
    import torch

    with pytest.raises(InputError, match="the operator 'failing_one'"):
        dr1.ops.register_custom_op("failing_one", path)()(torch.ones(2))


def test_this_file_is_checked_without_being_loaded(built):
    check_file(built("swish"))


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda s: st.lists(s) | st.dictionaries(st.text(), s))
)
def test_any_description_is_read_or_refused(data):
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse_description(data)


SIZES = st.integers(0, 9)


@given(a=SIZES, b=SIZES, c=st.integers(1, 9), text=st.sampled_from(["+", "-", "*", "/", "%", "max", "min"]))
def test_shape_text(a, b, c, text):
    work = {"+": a + c, "-": a - c, "*": a * c, "/": a // c, "%": a % c, "max": max(a, c), "min": min(a, c)}[text]
    assert output_shapes(f"i0.0 {c} {text},i1.0.;.", [(a,), (b,)]) == [[work, b], []]


@pytest.mark.parametrize("text", ["i0.5.", "i0.0 +.", "x.", "i0.0 0 /.", "i0.0 i0.0."])
def test_damaged_shape_text(text):
    with pytest.raises(InputError, match="shape function"):
        output_shapes(text, [(3,)])
