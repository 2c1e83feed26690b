"""The optimizer's update (and gradient clipping) as a functional graph behind the joint graph.

torch's own code is recorded: a *shadow* of the optimizer (same class and options, fake parameters, gradients and
state, hyper-parameters as traced numbers) makes one step, by the implementation that the real one would use
(for-loop, foreach or fused). So every option and every rounding is torch's.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import chain, count
from typing import Any

import torch
from torch import fx
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from graphopt.errors import OptimizerError
from graphopt.graph.collector import no_garbage_collection
from graphopt.graph.functional_trace import Recorder
from graphopt.graph.hyper_parameters import Clip, ClipNorm, group_names, is_input, lags, options
from graphopt.graph.torch_internals import (
    FakeTensorMode,
    default_to_fused_or_foreach,
    device_has_foreach_support,
    has_step_hooks,
)
from graphopt.graph.traced_number import Guard
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase

SUPPORTED = (SGD, Adam, AdamW, RMSprop, Adagrad)


@dataclass(frozen=True)
class UpdateTrace:
    """A functional graph from parameters, gradients, state and hyper-parameters to their new values.

    ``inputs`` and ``outputs`` are aligned with the graph's placeholders and results. A gradient input is the gradient
    that is *used*; `splice` binds it. ``constants`` are the tensors of ``get_attr`` nodes. ``first_step``: some state
    is made by this step (SGD's momentum under dampening), so that the next step needs another trace.
    """

    graph: fx.Graph
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    guards: tuple[Guard, ...] = ()
    constants: Mapping[str, torch.Tensor] = dataclass_field(default_factory=dict)
    first_step: bool = False


def supported(optimizer: Optimizer) -> str | None:
    """Why ``optimizer`` cannot be in a graph, None if it can. One that cannot runs as it is, after the graph."""
    kind = type(optimizer)
    if kind not in SUPPORTED:
        return f"{kind.__name__} is none of {', '.join(c.__name__ for c in SUPPORTED)}"
    if has_step_hooks(optimizer):
        return "hooks are registered on its step"
    replaced = optimizer.__dict__.get("step")
    if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
        return "its step method was replaced"
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return "a gradient scaler is at work"
    for group in optimizer.param_groups:
        for flag in ("differentiable", "capturable"):
            if group.get(flag):
                return f"{flag}=True"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if not p.is_floating_point():
            return f"a parameter is {str(p.dtype).removeprefix('torch.')}"
        if p.layout is not torch.strided or (p.grad is not None and p.grad.layout is not torch.strided):
            return "a parameter or gradient is sparse"
    if len({id(p) for p in parameters}) < len(parameters):
        return "a parameter is listed twice"
    return None


def check_ownership(optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> dict[str, int]:
    """Which optimizer (by position) owns each parameter. ``names``: parameter names of the model by ``id``.

    Raises OptimizerError if two own the same parameter, or one owns no parameter of the model.
    """
    owners: dict[str, int] = {}
    for i, optimizer in enumerate(optimizers):
        owned = {names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names}
        which = f"optimizer {i} ({type(optimizer).__name__})" if len(optimizers) > 1 else type(optimizer).__name__
        if not owned:
            raise OptimizerError(
                f"optimizer: {which} owns no parameter of the model; make it from the parameters of this very model, "
                "after moving or replacing them"
            )
        twice = sorted(owned & owners.keys())
        if twice:
            raise OptimizerError(
                f"optimizer: {twice[0]!r} is owned by optimizer {owners[twice[0]]} and by {which}; give it to one"
            )
        owners |= dict.fromkeys(owned, i)
    return owners


def initialize_state(optimizer: Optimizer, trainable: Collection[torch.Tensor]) -> None:
    """Make the state that ``optimizer`` would make at its first step for ``trainable`` parameters.

    Its own ``_init_group`` does it, with zero gradients for the time of the call. SGD makes a momentum only from the
    first gradient: here it is a tensor of -0.0, from which the first step makes the same bits
    (``momentum * -0.0 + g == g``, also for g = ±0); under dampening it stays missing (`UpdateTrace.first_step`).
    """
    wanted = {id(p) for p in trainable}
    lists = len(inspect.signature(optimizer._init_group).parameters) - 1  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        chosen = [p for p in group["params"] if id(p) in wanted]
        missing = [p for p in chosen if not optimizer.state.get(p)]
        if not missing or (isinstance(optimizer, SGD) and not group["momentum"]):
            continue
        with _zero_gradients(group["params"], {id(p) for p in missing}):
            optimizer._init_group(group, *([] for _ in range(lists)))  # type: ignore[attr-defined]
        if isinstance(optimizer, SGD) and not lags(optimizer, group):
            for p in missing:
                optimizer.state[p]["momentum_buffer"] = torch.full_like(p, -0.0, requires_grad=False)


@contextmanager
def _zero_gradients(parameters: Sequence[torch.Tensor], chosen: Collection[int]) -> Iterator[None]:
    """Zero gradients (of one element's memory) for the chosen parameters, none for the others."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            zero = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
            p.grad = zero if id(p) in chosen else None
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


@no_garbage_collection()
def trace_update(
    optimizers: Sequence[Optimizer], names: Mapping[int, str], fake_mode: FakeTensorMode, *,
    trainable: Collection[str], gradients: Mapping[str, torch.Tensor] | None = None,
    fused: bool = False,
) -> UpdateTrace:  # fmt: skip
    """The update of all parameters that have a gradient, by all ``optimizers``, as a graph.

    ``names``: parameter names by ``id(parameter)``. ``trainable``: names of those that have a gradient; the others
    are skipped, as torch skips parameters whose ``.grad`` is None. ``gradients``: how the gradients look (fake
    tensors), where that is not how their parameters look. ``fused``: record the fused implementations, whatever the
    groups say. State must exist (`initialize_state`). Raises CaptureError where `supported` was too hopeful; the
    optimizers are not touched in any case.
    """
    recorder = Recorder(fake_mode)
    shadows = []
    states: list[tuple[str, torch.Tensor, dict[str, Any]]] = []
    groups = [(name, o, o.param_groups[j]) for name, o, j in group_names(optimizers)]
    steps = [[p for p in g["params"] if names.get(id(p)) in trainable] for _, _, g in groups]
    fakes: dict[int, torch.Tensor] = {}
    for p in (p for chosen in steps for p in chosen):
        name = names[id(p)]
        fakes[id(p)] = recorder.tensor_input(Input(InputKind.PARAMETER, name), p, _module(name))
    for p in (p for chosen in steps for p in chosen):
        name = names[id(p)]
        like = (gradients or {}).get(name, p)
        fakes[id(p)].grad = recorder.tensor_input(Input(InputKind.GRADIENT, name), like, _module(name))
    for (_, optimizer, _), chosen in zip(groups, steps, strict=True):
        for p in chosen:
            states.append(
                (names[id(p)], fakes[id(p)], _shadow_state(recorder, names[id(p)], optimizer.state.get(p, {})))
            )
    state_of = {id(fake): state for _, fake, state in states}
    for optimizer in optimizers:
        shadow = object.__new__(type(optimizer))
        shadow.__dict__.update(optimizer.__dict__)
        shadow.state = defaultdict(dict, {})
        shadow.param_groups = []
        for (name, owner, group), chosen in zip(groups, steps, strict=True):
            if owner is optimizer:
                shadow.param_groups.append(_shadow_group(recorder, name, optimizer, group, chosen, fakes, fused))
                shadow.state.update({fakes[id(p)]: dict(state_of[id(fakes[id(p)])]) for p in chosen})
        shadows.append(shadow)
    with recorder.recording():
        for shadow in shadows:
            inspect.unwrap(type(shadow).step)(shadow)
    outputs: dict[Output, fx.Node] = {}
    for name, fake, _ in states:
        outputs[Output(OutputKind.PARAMETER, name)] = recorder.value(fake)
    made = False
    for shadow in shadows:
        for name, fake, before in states:
            for field, value in shadow.state.get(fake, {}).items():
                made |= field not in before
                outputs[Output(OutputKind.STATE, name, field)] = recorder.value(value)
    return _finish(recorder, outputs, first_step=made)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _shadow_state(recorder: Recorder, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter with inputs in place of its tensors."""
    return {
        field: recorder.tensor_input(Input(InputKind.STATE, name, field), value, _module(name))
        if isinstance(value, torch.Tensor)
        else value
        for field, value in state.items()
    }


def _shadow_group(
    recorder: Recorder, name: str, optimizer: Optimizer, group: Mapping[str, Any], chosen: Sequence[torch.Tensor],
    fakes: Mapping[int, torch.Tensor], fused: bool,
) -> dict[str, Any]:  # fmt: skip
    """A parameter group of fake parameters, with inputs in place of numbers and tensors among its options."""
    shadow: dict[str, Any] = {**group, "params": [fakes[id(p)] for p in chosen]}
    for field, value in options(optimizer, dict(group)):
        input_ = Input(InputKind.HYPER, name, field)
        if isinstance(value, torch.Tensor):
            value = recorder.tensor_input(input_, value)
        elif is_input(field, value):
            value = recorder.number_input(input_, value)
        key, _, index = field.partition(".")
        if index:
            shadow[key] = (*shadow[key][: int(index)], value, *shadow[key][int(index) + 1 :])
        else:
            shadow[key] = value
    if fused:
        shadow["foreach"], shadow["fused"] = False, True
    elif group.get("foreach") is None and group.get("fused") is None:
        # As torch decides for the real parameters; it would not take fake ones for ordinary tensors.
        _, foreach = default_to_fused_or_foreach(chosen, differentiable=False)
        tensor_lr = isinstance(group["lr"], torch.Tensor) and isinstance(optimizer, Adam)
        shadow["foreach"] = foreach and not tensor_lr
    return shadow


_MARKER = 0.7310585786300049  # any number that torch's own code does not contain


def trace_clip(clip: Clip, gradients: Mapping[str, torch.Tensor], fake_mode: FakeTensorMode) -> UpdateTrace:
    """Gradient clipping of all ``gradients`` (how they look, by parameter name, in the model's order) as a graph from
    gradients to the gradients that are used."""
    recorder = Recorder(fake_mode)
    fakes = {
        name: recorder.tensor_input(Input(InputKind.GRADIENT, name), like, _module(name))
        for name, like in gradients.items()
    }
    ((input_, bound),) = clip.inputs.items()
    number = recorder.number_input(input_, bound)
    recorder.markers = {_MARKER: number.node.node, -_MARKER: (-number).node.node}
    holders = []
    for fake in fakes.values():
        holder = torch.empty_like(fake)
        holder.grad = fake
        holders.append(holder)
    # As torch decides for real gradients; it would not take fake ones for ordinary tensors.
    foreach = all(device_has_foreach_support(g.device) for g in fakes.values())
    with recorder.recording():
        if isinstance(clip, ClipNorm):
            torch.nn.utils.clip_grad_norm_(holders, _MARKER, clip.norm_type, foreach=foreach)
        else:
            torch.nn.utils.clip_grad_value_(holders, _MARKER, foreach=foreach)
    outputs = {Output(OutputKind.GRADIENT, name): recorder.value(fake) for name, fake in fakes.items()}
    return _finish(recorder, outputs)


def _finish(recorder: Recorder, outputs: Mapping[Output, fx.Node], first_step: bool = False) -> UpdateTrace:
    """Close the graph. A value that did not change (its result is an input) is no output."""
    changed = {o: n for o, n in outputs.items() if n.op != "placeholder"}
    recorder.graph.output(tuple(changed.values())).meta.update(phase=Phase.OUTPUT)
    inputs = recorder.drop_dead()
    return UpdateTrace(
        recorder.graph, inputs, tuple(changed), tuple(recorder.guards), dict(recorder.constants), first_step
    )


def splice(
    graph: fx.Graph, trace: UpdateTrace, *, gradients: Mapping[str, fx.Node], parameters: Mapping[str, fx.Node],
    constants: MutableMapping[str, torch.Tensor],
) -> tuple[list[tuple[Input, fx.Node]], list[tuple[Output, fx.Node]]]:  # fmt: skip
    """Copy a trace behind the nodes of ``graph`` (before its output node, if it has one already).

    ``gradients`` and ``parameters`` bind those inputs by name; for all others placeholders are added behind the
    present ones. The trace's constants are added to ``constants``. Returns the new inputs with their placeholders, in
    order, and the outputs with their result nodes.
    """
    nodes: dict[fx.Node, fx.Node] = {}
    bound = {InputKind.PARAMETER: parameters, InputKind.GRADIENT: gradients}
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    added: list[tuple[Input, fx.Node]] = []
    sources = [n for n in trace.graph.nodes if n.op == "placeholder"]
    for input_, node in zip(trace.inputs, sources, strict=True):
        given = bound.get(input_.kind, {}).get(input_.name)
        if given is not None:
            nodes[node] = given
            continue
        with graph.inserting_after(last) if last is not None else graph.inserting_before(None):
            last = nodes[node] = graph.node_copy(node)
        last.target = last.name
        added.append((input_, last))
    renamed = {}
    for name, tensor in trace.constants.items():
        renamed[name] = new = next(n for n in chain([name], (f"{name}_{i}" for i in count(1))) if n not in constants)
        constants[new] = tensor
    output = next((n for n in graph.nodes if n.op == "output"), None)
    with graph.inserting_before(output) if output is not None else nullcontext():
        for node in trace.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                nodes[node] = graph.node_copy(node, lambda n: nodes[n])
                if node.op == "get_attr":
                    nodes[node].target = renamed[str(node.target)]
    (results,) = (n.args[0] for n in trace.graph.nodes if n.op == "output")
    return added, [(o, nodes[r]) for o, r in zip(trace.outputs, results, strict=True)]
