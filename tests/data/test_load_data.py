"""load_data: every form of data, and every way in which it can be wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from deepseek_r1.core import ConfigError, InputError, MissingExtraError, UnsafeFileError
from deepseek_r1.data import DataSplits, load_data
from deepseek_r1.runtime import preprocess


def _write(path, text):
    path.write_text(text)
    return path


def _all(data):
    pairs = [data.tensors(p) for p in data.parts()]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


# --- .npz


@pytest.mark.parametrize("names", [("x", "y"), ("inputs", "labels")])
def test_npz(tmp_path, names):
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    np.savez(tmp_path / "d.npz", **dict(zip(names, (x, y))))
    data = load_data(tmp_path / "d.npz", batch_size=4)
    assert isinstance(data, DataSplits)
    got, labels = _all(data)
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, x.astype(np.float32).tolist()))
    assert labels.dtype == torch.int64
    assert (data.labels, data.input_shape, data.input_dtype) == (("0", "1"), (3,), "float32")
    assert next(iter(data.train))[0].shape == (4, 3)


def test_bytes_are_pixels_and_integers_stay(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (10, 1, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", x=x, y=np.arange(10) % 2)
    data = load_data(tmp_path / "p.npz", fractions=(1, 0, 0))
    assert np.array_equal(preprocess(data.preprocessing, x), data.tensors("train")[0].numpy())
    assert data.val is None
    assert data.test is None
    np.savez(tmp_path / "t.npz", x=x[:, 0, 0].astype(np.int32), y=np.arange(10) % 2)
    assert load_data(tmp_path / "t.npz").input_dtype == "int64"


def test_quantities_keep_a_column(tmp_path):
    np.savez(tmp_path / "r.npz", x=np.ones((10, 2)), y=np.linspace(0, 1, 10))
    data = load_data(tmp_path / "r.npz")
    assert data.labels is None
    assert data.tensors("train")[1].shape == (7, 1)


class _Payload:
    def __reduce__(self):
        return (print, ("ran",))


def test_npz_with_pickled_objects_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "d.npz", x=np.array([_Payload()], dtype=object), y=np.array([1]))
    with pytest.raises(UnsafeFileError, match="pickled"):
        load_data(tmp_path / "d.npz")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.ones(3)}, r"has the arrays \['a'\]"),
        ({"x": np.ones((3, 2)), "y": np.arange(2)}, "one label for each"),
        ({"x": np.ones((0, 2)), "y": np.arange(0)}, "is empty"),
        ({"x": np.ones(()), "y": np.arange(3)}, "one label for each"),
        ({"x": np.array([[1.0], [2.0], [np.nan]]), "y": np.arange(3)}, "row 2 of the inputs has NaN"),
        ({"x": np.ones((4, 2)), "y": np.zeros(4, int)}, "at least two classes"),
        ({"x": np.array(["a", "b"]), "y": np.arange(2)}, "numbers are needed"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "d.npz")


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 cut off"])
def test_what_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"d\.npz"):
        load_data(tmp_path / "d.npz")


def test_a_damaged_npz_is_named(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(50, 3)), y=np.arange(50) % 2)
    data = bytearray((tmp_path / "d.npz").read_bytes())
    for i in range(300, 400):
        data[i] ^= 0xFF
    (tmp_path / "d.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"d\.npz is damaged"):
        load_data(tmp_path / "d.npz")


# --- .csv


def test_csv_with_texts_as_labels(tmp_path):
    rows = "\n".join(f"{i},{i / 2},{'ab'[i % 2]}" for i in range(10))
    data = load_data(_write(tmp_path / "d.csv", f"u,v,kind\n{rows}\n"), fractions=(1, 0, 0))
    x, y = data.tensors("train")
    assert data.labels == ("a", "b")
    assert x[3].tolist() == [3.0, 1.5]
    assert y.tolist() == [0, 1] * 5


def test_csv_label_column_by_name_and_quantities(tmp_path):
    rows = "\n".join(f"{i}.5,{i}" for i in range(10))
    data = load_data(_write(tmp_path / "d.csv", f"Target,u\n{rows}\n"), fractions=(1, 0, 0))
    assert data.tensors("train")[1][2].tolist() == [2.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 column"),
        ("a,label\n", "no rows"),
        ("1,2\n3,4\n", "no header"),
        ("a,b,label\n1,2,0\n1,1\n", "line 3: 2 cells, but the header has 3"),
        ("a,b,label\n1,2,0\n1,,1\n", "line 3, column 'b': '' is not a finite number"),
        ("a,b,label\n1,2,0\n1,nan,1\n", "line 3, column 'b': 'nan'"),
        ("a,b,label\n1,2,0\n1,2,\n", "is empty in row 2"),
        ("a,label\n1,0\n2,0\n3,0\n", "at least two classes"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_data(_write(tmp_path / "d.csv", text))


# --- .jsonl


@pytest.mark.parametrize("form", ["features", "fields"])
def test_jsonl(tmp_path, form):
    lines = [
        {"features": [i, i + 1], "label": "ab"[i % 2]} if form == "features" else {"u": i, "v": i + 1, "target": i % 2}
        for i in range(10)
    ]
    path = _write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    data = load_data(path, fractions=(1, 0, 0))
    x, y = data.tensors("train")
    assert x[4].tolist() == [4.0, 5.0]
    assert y.tolist() == [0, 1] * 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no rows"),
        ('{"label": 0, "u": 1}\n{"label": 1, "u"', "line 2: no JSON"),
        ("[1, 2]", "line 1: a JSON object"),
        ('{"u": 1}', 'line 1: no "label"'),
        ('{"label": 0, "u": 1}\n{"label": 1, "v": 1}', "line 2: the fields"),
        ('{"label": 0, "features": [1, 2]}\n{"label": 1, "features": [1]}', r"line 2: features of shape \(1,\)"),
        ('{"label": 0, "features": [[1, 2], [3]]}', "line 1: the features are ragged"),
        ('{"label": 0, "features": [NaN]}', "line 1: features must be finite"),
        ('{"label": 0, "u": "text"}', "line 1: features must be finite"),
        ('{"label": 0}', "line 1: features must be finite"),
        ('{"label": 0, "u": 1}\n{"label": "a", "u": 2}', "of the kinds int, str"),
    ],
)
def test_jsonl_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        load_data(_write(tmp_path / "d.jsonl", lines))


# --- folders of images


def _images(root, classes=("cat", "dog"), count=10, size=(6, 4), mode="RGB", ending="png"):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = (number * 100 + i,) * 3 if mode == "RGB" else number * 100 + i
            Image.new(mode, size, colour).save(root / name / f"{i}.{ending}")
    return root


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_folder(tmp_path, mode, channels):
    data = load_data(_images(tmp_path / "pets", mode=mode))
    assert (data.labels, data.input_shape) == (("cat", "dog"), (channels, 4, 6))
    x, y = _all(data)
    assert torch.equal((x.mean((1, 2, 3)) * 255 >= 99.5).long(), y)
    assert [len(data.tensors(p)[0]) for p in data.parts()] == [14, 2, 4]


def test_folder_that_is_split_already(tmp_path):
    for part, count in (("train", 6), ("valid", 2), ("test", 3)):
        _images(tmp_path / part, count=count, ending="jpg")
    data = load_data(tmp_path)
    assert [len(data.tensors(p)[0]) for p in data.parts()] == [12, 4, 6]
    assert "split already" in data.notes[0]


def test_images_are_resized_when_asked(tmp_path):
    _images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png is 9x9 .* is 6x4"):
        load_data(tmp_path)
    data = load_data(tmp_path, image_size=(8, 5))
    assert data.input_shape == (3, 8, 5)
    assert "resized to 5x8" in data.notes[0]


def test_what_is_left_out_is_said(tmp_path):
    _images(tmp_path)
    _write(tmp_path / "cat" / "notes.txt", "hello")
    assert "1 file(s)" in load_data(tmp_path).notes[0]


def test_an_unreadable_image_is_named(tmp_path):
    _images(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "dog" / "cut.png")
    whole = (tmp_path / "dog" / "cut.png").read_bytes()
    (tmp_path / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.png cannot be read"):
        load_data(tmp_path)
    (tmp_path / "dog" / "cut.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cut\.png cannot be read"):
        load_data(tmp_path)


def test_sixteen_bit_images_are_refused(tmp_path):
    _images(tmp_path, mode="L")
    Image.fromarray(np.full((4, 6), 60_000, dtype=np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(InputError, match="16 or 32 bits"):
        load_data(tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no class folders"):
        load_data(tmp_path)
    _images(tmp_path, classes=("cat",))
    with pytest.raises(InputError, match="single class 'cat'"):
        load_data(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match=r"dog has no \.png"):
        load_data(tmp_path)


def test_more_images_than_memory_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_r1.data._images.probe", lambda: type("H", (), {"memory_bytes": 10_000})())
    with pytest.raises(InputError, match=r"file\.py:loader"):
        load_data(_images(tmp_path))


def test_without_pillow_the_command_is_named(tmp_path, monkeypatch):
    _images(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deepseek-r1\[images\]'"):
        load_data(tmp_path)


# --- file.py:loader

_HEAD = """
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
def _set(n): return TensorDataset(torch.randn(n, 3), torch.arange(n) % 2)
"""


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("def loader(): return DataLoader(_set(6))", ["train"]),
        ("def loader(): return DataLoader(_set(6)), DataLoader(_set(4))", ["train", "val"]),
        (
            "def loader(): return DataLoader(_set(6)), DataLoader(_set(4)), DataLoader(_set(4))",
            ["train", "val", "test"],
        ),
        ("def loader(): return _set(6), _set(4)", ["train", "val"]),
        ("def loader(): return np.ones((20, 3)), np.arange(20) % 2", ["train", "val", "test"]),
        ("def loader(): return torch.ones(20, 3), torch.arange(20) % 2", ["train", "val", "test"]),
        ("loader = DataLoader(_set(6))", ["train"]),
    ],
)
def test_a_function_of_the_user(tmp_path, body, parts):
    _write(tmp_path / "mine.py", _HEAD + body)
    data = load_data(f"{tmp_path}/mine.py:loader", batch_size=2)
    assert data.parts() == parts
    assert len(next(iter(data.train))) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def loader(): return 5", "gave int"),
        ("def loader(): return DataLoader(_set(0))", "training part is empty"),
        ("def loader(): return 1 / 0", "ZeroDivisionError"),
        ("def lader(): return 5", r"Did you mean .*mine\.py:lader"),
        ("import no_such_thing", "ModuleNotFoundError in line 5"),
        ("def loader(:", "SyntaxError in line 5"),
    ],
)
def test_a_function_that_cannot_be_used(tmp_path, body, message):
    _write(tmp_path / "mine.py", _HEAD + body)
    with pytest.raises(InputError, match=message):
        load_data(f"{tmp_path}/mine.py:loader")


# --- the spec itself


def test_specs_that_lead_nowhere(tmp_path):
    for spec, message in (
        (tmp_path / "none.csv", "does not exist"),
        (f"{tmp_path}/none.py:loader", "does not exist"),
        (_write(tmp_path / "d.parquet", "x"), "unknown ending '.parquet'"),
    ):
        with pytest.raises(InputError, match=message):
            load_data(spec)
    with pytest.raises(ConfigError, match="batch_size"):
        load_data("digits", batch_size=0)
    with pytest.raises(InputError, match="no part 'all'"):
        load_data("digits").tensors("all")


def test_the_same_seed_gives_the_same_parts(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.arange(40.0)[:, None], y=np.arange(40) % 4)
    a, b, c = (load_data(tmp_path / "d.npz", seed=s).tensors("test")[0] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
