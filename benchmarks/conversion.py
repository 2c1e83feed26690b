"""One architecture as a supernet: what is elastic in it, and whether every subnet is right. For `benchmarks.elastic`.

In eval mode and float64, with parameters so spread that attention is far from uniform. A space is made with no option.
Reported: dimensions by kind, the share of parameters that is rigid (in no dimension that changes sizes), whether heads
and depth are elastic where the model has them. Checked by execution:

- **permutation**: the indices of all dimensions at random orders: the whole model's output stays;
- **slice**: the smallest subnet and random ones have the outputs and gradients of the graph that is resized operator by
  operator, on copies of the slices; gradients are zero beside them;
- **extraction**: the smallest subnet, fewest layers included, is bit for bit the module that is extracted, forward and
  gradients;
- **full**: the full choice is the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

import graphopt
from benchmarks import strangers, zoo
from benchmarks.measure import in_words, time_limit
from benchmarks.zoo._torchvision import define_missing_operators
from graphopt.elastic import Kind, Space
from graphopt.elastic import space as make_space
from graphopt.elastic.importance import sort_by_importance
from graphopt.elastic.report import rigid
from graphopt.graph.ancestry import ancestors
from graphopt.graph.axes import Axes
from graphopt.graph.op_rules import rule
from graphopt.graph.training_graph import InputKind

SIZE = 4
SAMPLES = 2
OK, WRONG, RIGID, NOT_CAPTURED = "ok", "WRONG", "nothing elastic", "not captured"

TOLERANCE = 1e-6
"""Of the largest value of an output, where all is computed in float64."""

define_missing_operators()  # before anything imports torchvision

_LISTED = [c for c in zoo.CASES if c.family != "torch"]
CASES: dict[str, zoo.Case] = {c.name: c for c in (*_LISTED, *strangers.CASES)}
"""All architectures, those of the zoo that others wrote first."""


@dataclass
class Converted:
    """One architecture. ``dimensions``: by kind. ``attention``, ``residual``: whether the model has attention, or sums
    of a tensor with what layers made of it. ``checks``: what each found, ``ok`` or what is wrong."""

    name: str
    family: str
    result: str = OK
    note: str = ""
    parameters: int = 0
    dimensions: dict[str, int] = field(default_factory=dict)
    rigid: float = 1.0
    smallest: float = 1.0
    attention: bool = False
    residual: bool = False
    checks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def convert(name: str, *, checked: bool = True, limit: int = 900) -> Converted:
    """Make a space of one architecture and check it, in at most ``limit`` seconds.

    Not ``checked``: it is only described, as it is, without another type of numbers or other weights."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = perf_counter()
    case = CASES[name]
    row = Converted(case.name, case.family, note=case.note)
    try:
        with time_limit(limit):
            _convert(case, row, checked)
    except graphopt.ElasticError as error:
        row.result, row.note = RIGID, str(error)
    except graphopt.CaptureError as error:
        row.result, row.note = NOT_CAPTURED, str(error)
    except Exception as error:  # whatever it is, the table tells it
        row.result, row.note = WRONG, in_words(error)
    row.seconds = round(perf_counter() - start, 1)
    return row


def _convert(case: zoo.Case, row: Converted, checked: bool) -> None:
    from tests.axes_oracles import cast, wide

    torch.manual_seed(0)
    model, batch = case.build().eval(), case.batch(SIZE)
    inputs = batch if isinstance(batch, dict) else batch[:-1]
    if isinstance(inputs, dict) and not case.captures:  # a loss that asks for the values of labels; a space needs none
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        row.note = ""
    row.parameters = sum(p.numel() for p in model.parameters())
    if not checked:
        describe(make_space(model, inputs), row)
        return
    try:
        made = make_space(wide(model), cast(inputs))
    except (graphopt.CaptureError, graphopt.BatchError):  # an operator has no float64 kernel
        made = make_space(model, inputs)
        describe(made, row)
        row.note = "not checked: no float64 form"
        return
    describe(made, row)
    for what, check in (("full", _full), ("slice", _slices), ("extraction", _extracted), ("permutation", _permuted)):
        row.checks[what] = check(made, cast(inputs))
    if any(found != OK for found in row.checks.values()):
        row.result = WRONG


def describe(made: Space, row: Converted) -> None:
    """What is elastic in a space, and what the model has that could be."""
    row.dimensions = {str(k): sum(d.kind is k for d in made.dimensions) for k in Kind}
    row.rigid = round(rigid(made), 4)
    shapes = made.graph(made.smallest).input_nodes(InputKind.PARAMETER)
    row.smallest = round(sum(n.meta["val"].numel() for n in shapes.values()) / max(1, row.parameters), 4)
    operators = {str(n.target) for n in made.primary.graph.nodes if n.op == "call_function"}
    row.attention = any("softmax" in o or "dot_product_attention" in o for o in operators)
    row.residual = _has_residuals(made.primary.axes)


def _has_residuals(axes: Axes) -> bool:
    """Whether there is a sum ``x + f(x)`` of tensors of one shape, with a layer in f."""
    order = {node: i for i, node in enumerate(axes.graph.nodes)}
    for _, a, b in axes.sums():
        early, late = sorted((a, b), key=order.__getitem__)
        if early.meta["val"].shape != late.meta["val"].shape:
            continue
        way = ancestors([late], lambda n, begin=order[early]: order[n] > begin)  # type: ignore[misc]
        if any(early in n.all_input_nodes for n in way) and any(map(_is_layer, way)):
            return True
    return False


def _is_layer(node: torch.fx.Node) -> bool:
    known = rule(node)
    return known is not None and known.family in ("contraction", "convolution", "attention", "recurrent")


def _outputs(made: Space, run: Callable[..., Any], inputs: Any) -> list[torch.Tensor]:
    from tests.elastic.oracles import outputs

    with torch.no_grad():
        torch.manual_seed(0)
        return outputs(run(**inputs) if isinstance(inputs, dict) else run(*inputs))


def _same(got: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = TOLERANCE) -> str:
    from tests.axes_oracles_resize import far

    problems = [far(f"output {i}", a, b, tolerance) for i, (a, b) in enumerate(zip(got, right, strict=True))]
    return "; ".join(filter(None, problems)) or OK


def _rounding(made: Space) -> float:
    """What sums in another order may differ by: more where a model computes some of it in float32 whatever it is given
    (state space models, norms)."""
    values = (n.meta.get("val") for n in made.primary.graph.nodes if n.op == "call_function")
    single = any(isinstance(v, torch.Tensor) and v.dtype is torch.float32 for v in values)
    return 100 * torch.finfo(torch.float32).eps if single else TOLERANCE


def _full(made: Space, inputs: Any) -> str:
    ours = _outputs(made, lambda *a, **k: made.run(made.full, *a, **k), inputs)
    whole = _outputs(made, copy.deepcopy(made.model), inputs)
    return _same(ours, whole)


def _slices(made: Space, inputs: Any) -> str:
    from tests.elastic.oracles import assert_is_slice

    whole = {d.name: d.full for d in made.dimensions if d.kind in (Kind.DEPTH, Kind.KERNEL)}
    for seed in range(-1, SAMPLES):
        choice = made.choice({**(made.smallest if seed < 0 else made.sample(seed=seed)), **whole})
        try:
            assert_is_slice(made, choice, inputs)
        except AssertionError as error:
            return f"{choice}: {str(error)[:300]}"
    return OK


def _extracted(made: Space, inputs: Any) -> str:
    """The smallest subnet as a module of its own, layers left out too: bit for bit the slice."""
    from tests.elastic.subnets import check_extraction

    try:
        check_extraction(made, made.smallest, inputs, training=False)
    except AssertionError as error:
        return str(error)[:300] or "it differs"
    return OK


def _permuted(made: Space, inputs: Any) -> str:
    """All dimensions permuted at random: by importance that is random."""
    before = _outputs(made, made.model, inputs)
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(p.shape, generator=generator) for n, p in made.model.named_parameters()}
    orders = sort_by_importance(made, scores)
    moved = any(not order.equal(torch.arange(len(order))) for order in orders.values())
    return _same(_outputs(made, made.model, inputs), before, _rounding(made)) if moved else "nothing was permuted"
