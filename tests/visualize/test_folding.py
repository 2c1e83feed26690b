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
