"""Axes of random programs: what is claimed of every value holds by execution, whatever meets whatever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt import capture
from graphopt.graph.axes import analyse
from graphopt.graph.forward import capture_forward
from tests.axes_oracles import PermutationOracle

WIDTHS = (2, 3, 4, 6, 12)  # small ones, that coincide and divide each other in many ways


@dataclass
class Line:
    """One operation of a program: what it does to the values so far, and the parameters it needs."""

    text: str
    run: Callable[[list[Tensor], list[Tensor]], Tensor]
    shapes: tuple[tuple[int, ...], ...] = ()


class Program(nn.Module):
    """Values computed one from another; the last one is reduced to one number a sample, which order cannot change."""

    def __init__(self, shape: tuple[int, ...], lines: list[Line]):
        super().__init__()
        self.shape, self.lines = shape, lines
        generator = torch.Generator().manual_seed(0)
        drawn = [[torch.randn(s, generator=generator) for s in line.shapes] for line in lines]
        self.weights = nn.ModuleList(nn.ParameterList(d) for d in drawn)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for line, weights in zip(self.lines, self.weights, strict=True):
            values.append(line.run(values, list(weights)))
        return values[-1].pow(2).flatten(1).mean(1)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program of 2 to 9 operations. Each is drawn for the shape that its operand has."""
    lines: list[Line] = []
    shape = draw(st.sampled_from([(4,), (3, 4), (6, 2)]))
    values = [torch.empty(5, *shape)]
    for _ in range(draw(st.integers(2, 9))):
        at = draw(st.integers(max(0, len(values) - 3), len(values) - 1))
        line = draw(st.sampled_from(OPERATIONS))(draw, at, values)
        if line is None:
            continue
        lines.append(line)
        values.append(line.run(values, [torch.empty(s) for s in line.shapes]))
        note(f"v{len(values) - 1} = {line.text}  {list(values[-1].shape)}")
    lines.append(Line("linear -> 3", lambda v, w: v[-1] @ w[0], ((values[-1].shape[-1], 3),)))
    return Program(shape, lines)


def _dim(draw: st.DrawFn, value: Tensor) -> int:
    return draw(st.integers(1, value.dim() - 1))


def linear(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line:
    width = draw(st.sampled_from(WIDTHS))
    shapes = ((width, values[at].shape[-1]), (width,))
    return Line(f"linear(v{at}) -> {width}", lambda v, w: F.linear(v[at], w[0], w[1]), shapes)


def scale(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line:
    d = _dim(draw, values[at])
    shape = (values[at].shape[d], *[1] * (values[at].dim() - 1 - d))
    return Line(f"scale(v{at}, {d})", lambda v, w: v[at] * w[0], (shape,))


def norm(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line:
    shape = (values[at].shape[-1],)
    return Line(f"layer_norm(v{at})", lambda v, w: F.layer_norm(v[at], shape, w[0], w[1]), (shape, shape))


def permute(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line:
    order = [0, *draw(st.permutations(range(1, values[at].dim())))]
    return Line(f"permute(v{at}, {order})", lambda v, w: v[at].permute(order))


def split(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    d = _dim(draw, values[at])
    outer = draw(st.sampled_from(WIDTHS))
    if values[at].shape[d] % outer or values[at].dim() > 4:
        return None
    inner = values[at].shape[d] // outer
    return Line(f"unflatten(v{at}, {d}, {outer}x{inner})", lambda v, w: v[at].unflatten(d, (outer, inner)))


def merge(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    if values[at].dim() < 3:
        return None
    d = draw(st.integers(1, values[at].dim() - 2))
    return Line(f"flatten(v{at}, {d})", lambda v, w: v[at].flatten(d, d + 1))


def concat(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    d = _dim(draw, values[at])
    fits = [i for i, v in enumerate(values) if _but(v, d) == _but(values[at], d) and v.shape[d] < 13]
    if not fits:
        return None
    other = draw(st.sampled_from(fits))
    return Line(f"cat(v{at}, v{other}, {d})", lambda v, w: torch.cat([v[at], v[other]], d))


def _but(value: Tensor, d: int) -> Any:
    return [s for i, s in enumerate(value.shape) if i != d] if value.dim() > d else None


def gate(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    d = _dim(draw, values[at])
    if values[at].shape[d] % 2:
        return None

    def run(v: list[Tensor], w: list[Tensor]) -> Tensor:
        a, b = v[at].chunk(2, d)
        return torch.cat([a * b.tanh(), a], d)

    return Line(f"gate(v{at}, {d})", run)


def cut(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    d = _dim(draw, values[at])
    size = values[at].shape[d]
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    step = draw(st.sampled_from([1, 1, 2, 3]))
    index = (slice(None),) * d + (slice(start, stop, step),)
    return Line(f"v{at}[{d}: {start}:{stop}:{step}]", lambda v, w: v[at][index])


def select(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    d = _dim(draw, values[at])
    i = draw(st.integers(0, values[at].shape[d] - 1))
    return Line(f"v{at}[{d}: {i}]", lambda v, w: v[at].select(d, i)) if values[at].dim() > 2 else None


def add(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line:
    fits = [i for i, v in enumerate(values) if v.shape == values[at].shape]
    other = draw(st.sampled_from(fits))
    return Line(f"v{at} + v{other}", lambda v, w: v[at] + v[other].sin())


def attend(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line | None:
    if values[at].dim() < 3:
        return None
    return Line(f"attend(v{at})", lambda v, w: F.scaled_dot_product_attention(v[at], v[at].cos(), v[at]))


def pointwise(draw: st.DrawFn, at: int, values: list[Tensor]) -> Line:
    d = _dim(draw, values[at])
    chosen: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "softmax": lambda x: x.softmax(d),
        "cumsum": lambda x: x.cumsum(d),
        "flip": lambda x: x.flip(d),
        "roll": lambda x: x.roll(1, d),
        "centre": lambda x: x - x.mean(d, keepdim=True),
        "neighbours": lambda x: F.pad(x, (0, 1)) - F.pad(x, (1, 0)),
        "twice": lambda x: torch.cat([x, x], d) if x.shape[d] < 7 else x,
        "interleaved": lambda x: x.repeat_interleave(2, d) if x.shape[d] < 7 else x,
        "repeated": lambda x: x.unsqueeze(d).expand(*x.shape[:d], 2, *x.shape[d:]).flatten(d, d + 1),
    }
    name = draw(st.sampled_from(list(chosen)))
    function = chosen[name]
    return Line(f"{name}(v{at}, {d})", lambda v, w: function(v[at]))


OPERATIONS = (
    linear, linear, linear, scale, norm, permute, split, split, merge, merge, concat, gate, gate, cut, select, add, add,
    attend, pointwise, pointwise,
)  # fmt: skip


def _batch(model: Program) -> tuple[Tensor]:
    return (torch.randn(5, *model.shape, generator=torch.Generator().manual_seed(1)),)


@given(st.data())
def test_claims_hold_on_forward_graphs(data: st.DataObject) -> None:
    model = data.draw(programs())
    _check(model, capture_forward)


@given(st.data())
def test_claims_hold_on_joint_graphs(data: st.DataObject) -> None:
    model = data.draw(programs())
    _check(model, capture)


def _check(model: Program, trace: Callable[..., Any]) -> None:
    batch = _batch(model)
    axes = analyse(trace(model, batch))
    assert not axes.unknown
    assert PermutationOracle(axes, model.double(), batch).violations([g for g in axes.groups() if g.free]) == {}


def test_programs_have_free_axes() -> None:
    """So that the claims above are not empty."""
    hidden = Line("linear", lambda v, w: F.linear(v[0], w[0], w[1]), ((12, 4), (12,)))
    model = Program((4,), [hidden, Line("linear", lambda v, w: v[-1] @ w[0], ((12, 3),))])
    assert [g.size for g in analyse(capture_forward(model, _batch(model))).groups() if g.free] == [12, 3]
