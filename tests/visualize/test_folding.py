"""The tree of groups: every operator once, nowhere more than a person can read, modules as they are nested."""

from hypothesis import given
from hypothesis import strategies as st

from graphopt.visualize.folding import BACKWARD, FORWARD, MOST, UPDATE, Group, Spot, fold

paths = st.lists(st.sampled_from(["a", "b", "layer", "0", "1"]), max_size=4).map(".".join)
spots = st.builds(
    Spot, st.sampled_from([FORWARD, BACKWARD, UPDATE]), paths, st.sampled_from(["", "m.py:1", "m.py:2"]),
    st.sampled_from(["", "mm", "relu"]),
)  # fmt: skip


def every(group: Group):
    yield group
    for child in group.children:
        yield from every(child)


def outline(group: Group) -> list:
    return [group.label, *([outline(c) for c in group.children] or sorted(group.members))]


@given(st.lists(spots, max_size=200))
def test_every_operator_is_in_one_group(given_spots):
    root = fold(given_spots)
    assert sorted(root.all_members()) == list(range(len(given_spots)))
    for group in every(root):
        assert not (group.children and group.members), "a level holds boxes or operators, not both"
        for column in (FORWARD, BACKWARD, UPDATE):
            assert sum(given_spots[i].column == column for i in group.members) <= MOST


def test_levels_of_long_modules_are_divided():
    root = fold([Spot(FORWARD, f"layers.{i}", "", "mm") for i in range(500)] + [Spot(FORWARD, "flat", "", "add")] * 400)
    for group in every(root):
        assert len(group.children) <= MOST and len(group.members) <= MOST


def test_operators_beside_submodules_are_grouped_by_line():
    root = fold([
        Spot(FORWARD, "block.inner", "m.py:5", "mm"), Spot(FORWARD, "block", "m.py:6", "add"),
        Spot(BACKWARD, "block", "m.py:6", "neg"), Spot(BACKWARD, "block.inner", "m.py:5", "mm"),
        Spot(FORWARD, "head", "", "mm"),
    ])  # fmt: skip
    assert outline(root) == ["step", ["block", ["inner", 0, 3], ["add, neg  m.py:6", 1, 2]], ["head", 4]]


def test_one_line_around_submodules_is_divided_at_them():
    """``x + outer(relu(inner(x)))``: the sum stands behind what it adds, and backward beside its forward."""
    root = fold([
        Spot(FORWARD, "b.inner", "m.py:1", "mm"), Spot(FORWARD, "b", "m.py:1", "relu"),
        Spot(FORWARD, "b.outer", "m.py:1", "mm"), Spot(FORWARD, "b", "m.py:1", "add"),
        Spot(BACKWARD, "b.outer", "m.py:1", "mm"), Spot(BACKWARD, "b", "m.py:1", "threshold_backward"),
        Spot(BACKWARD, "b.inner", "m.py:1", "mm"), Spot(BACKWARD, "b", "", "add"),
    ])  # fmt: skip
    assert outline(root)[1][1:] == [
        ["add", 7], ["inner", 0, 6], ["relu, threshold_backward  m.py:1", 1, 5], ["outer", 2, 4], ["add  m.py:1", 3],
    ]  # fmt: skip


def test_an_input_stands_with_its_reader():
    root = fold([
        Spot(FORWARD, "b", "m.py:2", "", 2), Spot(FORWARD, "b.inner", "", "mm"), Spot(FORWARD, "b", "m.py:2", "mul"),
    ])  # fmt: skip
    assert outline(root)[1][1:] == [["inner", 1], ["mul  m.py:2", 0, 2]]


def test_what_is_not_trained_has_no_backward_and_comes_first():
    root = fold([
        Spot(FORWARD, "b.frozen", "", "mm"), Spot(FORWARD, "b", "m.py:1", "relu"), Spot(FORWARD, "b.head", "", "mm"),
        Spot(BACKWARD, "b.head", "", "mm"), Spot(BACKWARD, "b", "m.py:1", "threshold_backward"),
    ])  # fmt: skip
    assert [line[0] for line in outline(root)[1][1:]] == ["frozen", "relu, threshold_backward  m.py:1", "head"]


def test_update_is_a_tree_of_its_own_and_single_children_are_one():
    root = fold([
        Spot(FORWARD, "encoder.layers.0", "", "mm"), Spot(UPDATE, "encoder.layers.0", "", "mul"),
        Spot(UPDATE, "head", "", "mul"),
    ])  # fmt: skip
    assert outline(root) == ["step", ["encoder.layers.0", 0], ["update", ["encoder.layers.0", 1], ["head", 2]]]


def test_backward_stands_beside_its_forward_in_parts_of_a_long_level():
    count = 3 * MOST
    root = fold([Spot(FORWARD, "", "", "f")] * count + [Spot(BACKWARD, "", "", "b")] * count)
    first, last = root.children[0], root.children[-1]
    assert 0 in first.members and 2 * count - 1 in first.members  # the first of forward, the last of backward
    assert count - 1 in last.members and count in last.members
