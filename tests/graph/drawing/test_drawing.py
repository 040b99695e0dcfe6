"""A drawing as text, JSON, SVG and HTML: whole, escaped, the same for the same drawing."""

import json
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, DeepSeekError
from deepseek_r1.graph import trace
from deepseek_r1.graph.drawing._model import quantity
from deepseek_r1.graph.drawing._page import embedded

#: torch writes code with the names of modules in it, so a quote in one of those stops torch itself.
PART = "</script><img src=x onerror=alert(1)>&'<!--"
EVIL = "</script><img src=x onerror=alert(1)>&\"'\u2028]]>"


@pytest.fixture(scope="module")
def hostile():
    """A model whose every name wants to be markup."""
    net = type(EVIL, (nn.Module,), {"forward": lambda self, x: self.get_submodule(PART)(x)})()
    net.add_module(PART, nn.Sequential(nn.Linear(2, 2), nn.Softmax(dim=-1)))
    return trace(net, torch.ones(2, 2), name=EVIL)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.tags


def test_text_is_a_table_with_sums(drawing):
    lines = drawing.text().splitlines()
    assert lines[0].startswith("Net: 12 operators, ")
    assert re.search(r"^blocks: Sequential +\S+ .s +38\.9 kFLOP", drawing.text(), re.MULTILINE)
    assert re.search(r"^    conv2d \(conv\) +\[batch, 4, 8, 8\] float32 .* 18\.4 kFLOP .*conftest\.py:\d+$",
                     drawing.text(), re.MULTILINE)  # fmt: skip
    assert lines[-1] == "batch: dimension 0 of x, 1 in this run"
    assert str(drawing) == drawing.text()
    assert len(drawing.text(depth=1).splitlines()) == len(lines) - 12


def test_text_has_one_line_a_node_whatever_the_names(hostile):
    assert len(hostile.text().splitlines()) == len(hostile.nodes) + 6
    assert "\u2028" not in hostile.text()


def test_json_has_everything_and_reads_back(drawing):
    data = json.loads(drawing.json(), parse_constant=lambda name: pytest.fail(name))
    assert data == drawing.to_dict()
    assert data["schema_version"] == 1
    assert [n["id"] for n in data["nodes"]] == [n.id for n in drawing.nodes]
    relu = next(n for n in data["nodes"] if n["id"] == "relu")
    assert relu["outputs"] == [{"shape": ["batch", 4, 8, 8], "dtype": "float32", "measured": [1, 4, 8, 8]}]
    assert {"flops", "bytes", "read_bytes", "time_ms", "source", "code", "module", "operator"} <= set(relu)
    assert data["totals"]["flops"] == drawing.total("flops")
    assert data["facts"]["threads"] == torch.get_num_threads()
    assert [c["label"] for c in data["tree"]["children"] if isinstance(c, dict)] == ["stem", "blocks"]


def test_json_survives_numbers_that_are_none(drawing):
    class Masked(nn.Module):
        def forward(self, x):
            return torch.full_like(x, float("-inf")) + torch.full((2,), float("nan"))

    drawn = trace(Masked(), torch.ones(2, 2))
    assert any("nan" in a for n in drawn.nodes for a in n.attributes)
    odd = replace(drawn, nodes=tuple(replace(n, time_ms=math.nan, flops=None) for n in drawn.nodes))
    data = json.loads(odd.json(), parse_constant=lambda name: pytest.fail(name))
    assert {n["time_ms"] for n in data["nodes"]} == {None}
    assert data["totals"]["time"] == 0
    assert "NaN" not in odd.html().partition('id="data">')[2].partition("</script>")[0]
    ElementTree.fromstring(odd.svg())


@pytest.mark.parametrize("cost", ["time", "flops", "bytes"])
@pytest.mark.parametrize("expand", [None, "all", 0, 1])
def test_svg_is_xml_and_stands_alone(drawing, cost, expand):
    picture = drawing.svg(cost=cost, expand=expand)
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ("conv2d conv" in texts) is (expand in ("all", None))
    assert any(t.startswith("+ stem") for t in texts) is (expand == 0)
    assert "href" not in picture
    assert "<script" not in picture
    assert picture == drawing.svg(cost=cost, expand=expand)


def test_svg_is_hotter_where_it_costs_more(drawing):
    picture = drawing.svg(cost="flops", expand="all")
    assert picture.count('fill="#f08c4a"') == 2  # the two equal convolutions have most
    assert picture.count('fill="#ffffff"') == 0


@pytest.mark.parametrize("wish", ["some", -1, 1.5])
def test_wrong_wishes_are_errors(drawing, wish):
    with pytest.raises(ConfigError, match="number of levels"):
        drawing.svg(expand=wish)
    with pytest.raises(ConfigError, match="time, flops, bytes"):
        drawing.svg(cost="money")
    with pytest.raises(ConfigError, match="time, flops, bytes"):
        drawing.total("money")


def test_html_is_one_file_that_loads_nothing(drawing):
    page = drawing.html()
    assert page == drawing.html()
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "div", "input", "span", "button",
               "main", "svg", "g", "b", "i", "aside", "noscript", "script"}  # fmt: skip
    found = tags(page)
    assert {t for t, _ in found} <= allowed
    assert not [a for _, a in found if {"src", "href", "srcset", "action"} & set(a)]
    policy = next(a["content"] for t, a in found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert set(re.findall(r"https?://[^\"'\s)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert "url(" not in page


def test_names_are_never_markup(hostile):
    page = hostile.html()
    assert [t for t, _ in tags(page)].count("script") == 2
    assert not [t for t, _ in tags(page) if t == "img"]
    assert unescape(re.search("<title>(.*?)</title>", page, re.DOTALL)[1]) == f"{EVIL}: graph"
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["name"] == EVIL
    assert data["tree"]["children"][1]["label"] == PART
    picture = hostile.svg()
    assert "<img" not in picture
    ElementTree.fromstring(picture)


def test_data_cannot_end_its_element():
    for text in ("</script>", "<!--", "]]>", "&amp;", "\u2028", "\x00"):
        inside = embedded({"a": text})
        assert not re.search("[<>&\u2028\x00]", inside)
        assert json.loads(inside) == {"a": text}


def test_a_notebook_shows_the_page_in_a_frame(hostile):
    shown = hostile._repr_html_()
    found = tags(shown)
    assert [t for t, _ in found] == ["iframe"]
    frame = found[0][1]
    assert frame["srcdoc"] == hostile.html()
    assert frame["sandbox"] == "allow-scripts"


@pytest.mark.parametrize("ending", ["html", "svg", "json", "txt"])
def test_save_by_ending(drawing, tmp_path, ending):
    path = drawing.save(tmp_path / "new" / f"net.{ending}")
    want = {"html": drawing.html, "svg": drawing.svg, "json": drawing.json, "txt": drawing.text}[ending]()
    assert path.read_text() == want


def test_save_refuses_other_endings_and_leaves_old_files(drawing, tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.html, \.svg, \.json, \.txt"):
        drawing.save(tmp_path / "net.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises((OSError, DeepSeekError)):
        drawing.save(tmp_path / "file" / "net.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_report_has_the_sums(drawing):
    report = drawing.report()
    assert report.ok
    assert report["operators"].after == 12
    assert report["time"].after == drawing.total("time")
    assert "batch: dimension 0 of x, 1 in this run" in report.notes


@pytest.mark.parametrize(
    ("value", "cost", "text"),
    [(0, "time", "0 µs"), (0.9996, "time", "1 ms"), (1234, "time", "1.23 s"), (5e6, "time", "5e+03 s"),
     (999, "flops", "999 FLOP"), (1e12, "flops", "1 TFLOP"), (2e18, "bytes", "2e+03 PB"), (None, "bytes", "-")],
)  # fmt: skip
def test_quantities(value, cost, text):
    assert quantity(value, cost) == text
