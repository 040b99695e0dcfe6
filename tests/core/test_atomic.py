"""Files that are wholly there or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from deepseek_r1.core import atomic


@contextlib.contextmanager
def largest_file(size: int):
    """Let the kernel refuse longer files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_bytes_and_json(tmp_path):
    atomic.write_bytes(tmp_path / "new" / "a.bin", b"abc")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    atomic.write_json(tmp_path / "a.json", {"ä": [1, 2.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ä": [1, 2.5]}
    assert "ä" in (tmp_path / "a.json").read_text()


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic.write_bytes(tmp_path / "a", b"")
        with atomic.atomic_dir(tmp_path / "d") as tmp:
            (tmp / "f").write_text("x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_path(path) as tmp:
        tmp.write_text("new, but not to the e")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with largest_file(1000), pytest.raises(OSError, match="too large"):
        atomic.write_bytes(path, b"x" * 5000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "d"
    for text in ("one", "two"):
        with atomic.atomic_dir(target) as tmp:
            (tmp / f"{text}.txt").write_text(text)
            (tmp / "sub").mkdir()
            (tmp / "sub" / "x").write_text(text)
    assert sorted(p.name for p in target.iterdir()) == ["sub", "two.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_error_leaves_the_old_directory(tmp_path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.atomic_dir(target) as tmp:
        (tmp / "new").write_text("new")
        raise ZeroDivisionError
    assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("old")
    real = os.replace

    def refuse(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError(30, "Read-only file system")
        real(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Read-only"), atomic.atomic_dir(target) as tmp:
        (tmp / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"), atomic.atomic_dir(tmp_path / "f"):
        pass
    assert (tmp_path / "f").read_text() == "mine"


def test_recover_puts_back_what_a_kill_left_aside(tmp_path):
    (tmp_path / ".d.old").mkdir()
    (tmp_path / ".d.old" / "x").write_text("kept")
    atomic.recover_dir(tmp_path / "d")
    assert (tmp_path / "d" / "x").read_text() == "kept"
    assert not (tmp_path / ".d.old").exists()


def test_recover_does_not_touch_a_directory_that_stands(tmp_path):
    for name in (".d.old", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    atomic.recover_dir(tmp_path / "d")
    assert (tmp_path / "d" / "x").read_text() == "d"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    script = textwrap.dedent(
        f"""
        import time
        from deepseek_r1.core import atomic
        with atomic.atomic_path({str(path)!r}) as tmp:
            tmp.write_text("half")
            print("half", flush=True)
            time.sleep(60)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.read_text() == "old"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert atomic.sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_errors_name_the_target_and_no_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        atomic.write_bytes(tmp_path / "folder", b"x")
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(OSError, match="No space") as caught, atomic.atomic_dir(tmp_path / "made"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "made")
    with pytest.raises(FileNotFoundError) as caught, atomic.atomic_path(tmp_path / "a"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another"), "another file's trouble stays its own"
