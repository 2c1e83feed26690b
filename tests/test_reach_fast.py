"""Reach on the cheap cases of the zoo; `make reach` does all of them."""

import pytest

from benchmarks import reach, zoo


def test_every_modality_is_among_the_fast_cases():
    cases = [zoo.case(name) for name in reach.FAST]
    assert {case.modality for case in cases} == {case.modality for case in zoo.CASES}


@pytest.mark.parametrize("name", reach.FAST)
def test_three_steps_equal_eager(name):
    reached = reach.reach(zoo.case(name))
    assert (reached.result, reached.note) == (reach.EQUAL, "")
    assert reached.operators is not None and reached.operators[1] <= reached.operators[0]
    assert reached.flops is not None and reached.flops[1] <= reached.flops[0]
    assert reached.bytes_kept is not None and reached.bytes_kept[1] <= reached.bytes_kept[0]
