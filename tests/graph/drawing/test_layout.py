"""Groups, rows and coordinates: for any graph, no cycle, no overlap, and every line arrives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_r1.graph import trace
from deepseek_r1.graph.drawing._layers import plans
from deepseek_r1.graph.drawing._model import Group, Node, Scope, Tensor
from deepseek_r1.graph.drawing._place import GAP_X, HEAD, place
from deepseek_r1.graph.drawing._tree import grow, open_at_first, open_by


def scope(path):
    return Scope(key=path, path=path, type="Part")


@st.composite
def graphs(draw):
    """Nodes in program order, each in a few nested scopes, taking what came before."""
    count = draw(st.integers(1, 24))
    nodes = []
    for i in range(count):
        depth = draw(st.integers(0, 3))
        paths = [".".join("ab"[draw(st.integers(0, 1))] for _ in range(d + 1)) for d in range(depth)]
        inputs = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        nodes.append(
            Node(
                id=f"n{i}",
                kind="operator",
                label="op" * draw(st.integers(1, 9)),
                scopes=tuple(scope(p) for p in paths),
                module=paths[-1] if paths else "",
                inputs=tuple(f"n{j}" for j in inputs),
                outputs=(Tensor(shape=("batch", 3), dtype="float32"),),
            )
        )
    return tuple(nodes)


def boxes_of(inside, x=0.0, y=0.0):
    """(box, its corner on the whole picture) of every box."""
    for box in inside.boxes:
        yield box, x + box.x, y + box.y
        if box.inside:
            yield from boxes_of(box.inside, x + box.x, y + box.y)


def ends(inside, x=0.0, y=0.0):
    """Where every line of the picture begins and ends."""
    for _, points in inside.lines:
        yield (x + points[0][0], y + points[0][1]), (x + points[-1][0], y + points[-1][1])
    for box in inside.boxes:
        if box.inside:
            yield from ends(box.inside, x + box.x, y + box.y)


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_node_is_in_the_tree_once_and_in_order(nodes):
    root = grow(nodes, "net", "Net")
    assert [n.id for n in root.nodes()] == [n.id for n in nodes]
    assert len({g.id for g in (root, *root.groups())}) == 1 + len(list(root.groups()))
    assert all(g.children for g in root.groups())


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_lines_go_from_one_row_to_the_next_whatever_is_closed(nodes):
    root = grow(nodes, "net", "Net")
    for group_id, plan in plans(root).items():
        assert sorted(v for row in plan.rows for v in row) == list(range(len(plan.vertices)))
        for a, b, _ in plan.segments:
            # A cycle between closed groups would need a line that goes up.
            assert plan.vertices[b].row == plan.vertices[a].row + 1, group_id


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([None, "all", 0, 1]))
def test_boxes_lie_apart_and_inside_of_their_groups(nodes, expand):
    root = grow(nodes, "net", "Net")
    inside = place(root, plans(root), open_by(root, expand))

    def check(content, head):
        for box in content.boxes:
            assert box.x >= -1e-6
            assert box.y >= head - 1e-6
            assert box.x + box.width <= content.width + 1e-6
            assert box.y + box.height <= content.height + 1e-6
            if box.inside:
                check(box.inside, HEAD)
        rows = {}
        for box in content.boxes:
            rows.setdefault(round(box.y + box.height / 2, 3), []).append(box)
        for row in rows.values():
            row.sort(key=lambda b: b.x)
            for a, b in pairwise(row):
                assert a.x + a.width + GAP_X <= b.x + 1e-6

    check(inside, 0)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([None, "all", 0]))
def test_lines_arrive_where_something_is(nodes, expand):
    root = grow(nodes, "net", "Net")
    inside = place(root, plans(root), open_by(root, expand))
    marks = {p for pair in ends(inside) for p in pair}
    for _, (x, y) in ends(inside):
        at_box = any(bx <= x <= bx + b.width and abs(by - y) < 1e-6 for b, bx, by in boxes_of(inside))
        at_border = any(bx <= x <= bx + b.width and abs(by + b.height - y) < 1e-6 for b, bx, by in boxes_of(inside))
        goes_on = sum(abs(x - mx) < 1e-6 and abs(y - my) < 1e-6 for mx, my in marks) >= 1
        assert at_box or at_border or goes_on


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_every_use_of_a_result_is_drawn(nodes):
    """From each taker, lines lead back up to the giver, through borders of groups."""
    root = grow(nodes, "net", "Net")
    known = plans(root)
    for group in (root, *root.groups()):
        where = {
            n.id: i
            for i, c in enumerate(group.children)
            for n in (c.nodes() if isinstance(c, Group) else (c,))
        }  # fmt: skip
        plan = known[group.id]
        lines = {(value, b): a for a, b, value in plan.segments}
        for node in group.nodes():
            for source in node.inputs:
                if where.get(source) == where[node.id]:
                    continue
                vertex = where[node.id]
                while (source, vertex) in lines:
                    vertex = lines[source, vertex]
                end = plan.vertices[vertex]
                assert end.kind == ("child" if source in where else "in")
                assert end.kind == "in" or end.child == where[source]


class Shared(nn.Module):
    """One activation, used twice: as one box it would be before and after the layer between."""

    def __init__(self):
        super().__init__()
        self.act = nn.Sequential(nn.ReLU(), nn.Tanh())
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.act(self.fc(self.act(x)))


def test_two_calls_of_one_module_are_two_groups():
    drawn = trace(Shared(), torch.ones(2, 4))
    labels = [c.label for c in drawn._root.children]
    assert labels == ["x", "act", "linear", "act", "output"]


def test_small_modules_are_their_operator_and_loose_operators_are_gathered(drawing):
    tree = drawing._root
    assert [c.label for c in tree.children] == ["x", "stem", "blocks", "mean", "linear", "output"]
    assert [c.label for c in tree.children[2].children] == ["0", "1"]
    nodes = (*(Node(id=f"s{i}", kind="operator", label="add") for i in range(9)),)
    nodes += tuple(Node(id=f"m{i}", kind="operator", label="mul", scopes=(scope("m"),), module="m") for i in range(2))
    root = grow(nodes, "net", "Net")
    assert [(c.label, c.kind) for c in root.children] == [("9 operators", "run"), ("m", "module")]


def test_what_is_open_at_first_fits_the_screen(drawing):
    def chain(n, path):
        return [Node(id=f"{path}{i}", kind="operator", label="x", scopes=(scope(path),), module=path) for i in range(n)]

    small, large = grow(tuple(chain(5, "a") + chain(5, "b")), "n", "N"), grow(tuple(chain(500, "a")), "n", "N")
    assert open_at_first(small) == {"", "a", "b"}
    assert open_at_first(large) == {""}
    assert open_by(drawing._root, 0) == {""}
    assert len(open_by(drawing._root, 1)) == 3
    assert len(open_by(drawing._root, "all")) == 5


def test_a_line_past_many_boxes_is_straight_and_boxes_stand_in_a_column():
    class Long(nn.Module):
        def forward(self, x):
            y = x.relu()
            for _ in range(6):
                y = y.tanh()
            return y + x

    drawn = trace(Long(), torch.ones(2, 4))
    inside = place(drawn._root, drawn._plans, open_by(drawn._root, "all"))
    centres = {round(b.x + b.width / 2, 3) for b in inside.boxes}
    assert len(centres) == 1
    bends = [points for _, points in inside.lines if len(points) == 5]
    assert len({round(p[4][0], 3) for p in bends}) == 1


@pytest.mark.parametrize("count", [1, 500])
def test_large_graphs_are_quick_to_place(count, slower):
    import time

    nodes = tuple(
        Node(
            id=f"n{i}",
            kind="operator",
            label="op",
            inputs=(f"n{i - 1}", f"n{i * 9 // 10}")[: 2 if i > 20 else 1 if i else 0],
        )
        for i in range(count)
    )
    start = time.process_time()
    root = grow(nodes, "net", "Net")
    place(root, plans(root), open_by(root, "all"))
    assert time.process_time() - start < 5 * slower
