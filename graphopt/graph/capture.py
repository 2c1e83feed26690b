"""`capture`: a model's training step as one `TrainingGraph`.

Route: `torch._functorch.aot_autograd.aot_export_joint_with_descriptors` traces forward, loss and backward of the
user's own Python into one functional ATen graph. Chosen over `torch.func.grad_and_value` with `make_fx` on evidence:
it functionalises buffers that change, keeps autograd's own order of gradient additions (so results are eager's bit
for bit), and describes every input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from graphopt.errors import BatchError, CaptureError, GraphoptError
from graphopt.graph.assemble import with_update
from graphopt.graph.batch import BatchLayout, ModelLoss, flatten
from graphopt.graph.draft import infer
from graphopt.graph.provenance import Provenance
from graphopt.graph.sizes import Symbols
from graphopt.graph.step_module import StepModule, autocast, unchanged
from graphopt.graph.torch_internals import ExportedJoint, export_joint
from graphopt.graph.training_graph import (
    Input,
    InputKind,
    Output,
    OutputKind,
    Phase,
    Signature,
    TrainingGraph,
)


@dataclass(frozen=True)
class Captured:
    """A captured graph with what it takes to call it: the layout of its batch and the nesting of its outputs."""

    graph: TrainingGraph
    layout: BatchLayout
    output_spec: Any = None
    output_constants: tuple[tuple[int, Any], ...] = ()


def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    optimizer: Any = None,
    backward: bool = True,
    gradients: str | Collection[str] = "wanted",
    clip: Any = None,
    accumulate: int = 1,
) -> TrainingGraph:
    """Capture forward, loss, backward and (with an optimizer) update of one training step.

    Args:
        model: any `torch.nn.Module`; it is traced in its present train/eval mode and is not changed.
        batch: an example batch: a tensor, a tuple ``(inputs..., target)``, or a dict for models called by keyword.
            Its first dimension is captured symbolically unless it is 1, which is a regime of its own.
        loss: ``loss(model(*inputs), target)``, a scalar. ``"model"``, or None with an optimizer: the model returns
            its own loss. None otherwise: the outputs' tangents become inputs.
        optimizer: a `torch.optim.Optimizer` or a list of them, whose update becomes part of the graph (SGD, Adam,
            AdamW, RMSprop, Adagrad; any other leaves gradients as outputs). State that the optimizer would make at
            its first step is made now.
        backward: False captures the forward graph alone.
        gradients: ``"wanted"``: of parameters and batch tensors that require grad; ``"all"``: of every floating-point
            parameter and batch tensor, whatever their flags; or the names of the parameters wanted.
        clip: maximal norm (a float), `ClipNorm` or `ClipValue`: gradients are clipped before the update.
        accumulate: the loss is divided by it and gradients are added to those accumulated so far, which become inputs.

    Returns:
        The graph. Its range of validity is ``graph.symbols`` (free sizes and guards).

    Raises:
        BatchError: the batch is empty or the model rejects it.
        CaptureError: the step cannot become one graph (data-dependent control flow ...); says where.
        LossError: backward cannot start from the loss (no scalar, detached ...).
        OptimizerError: an optimizer owns no parameter of the model, or two own the same one.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = (torch.randn(5, 4), torch.randint(2, (5,)))
        >>> graph = graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy)
        >>> [str(o) for o in graph.outputs][:2]
        ['loss loss', 'gradient 0.weight']
        >>> graph.flops({"batch": 10}) == 2 * graph.flops({"batch": 5})
        True
    """
    captured = capture_step(
        model, batch, loss=loss if loss is not None or optimizer is None else ModelLoss, backward=backward,
        gradients=gradients, accumulate=accumulate,
    )  # fmt: skip
    if optimizer is None and clip is None and accumulate == 1:
        return captured.graph
    return with_update(captured.graph, model, optimizer, clip=clip, accumulated=accumulate > 1).graph


def capture_step(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    backward: bool = True,
    gradients: str | Collection[str] = "wanted",
    accumulate: int = 1,
) -> Captured:
    """`capture` without the update: the joint graph and how to call it. Arguments as there."""
    _check_arguments(model, loss, accumulate)
    tensors, layout, size = flatten(batch)
    _check_devices(model, tensors, layout)
    parameters = dict(model.named_parameters())
    if not backward:
        trainable: set[str] = set()
    elif gradients == "wanted":
        trainable = {name for name, p in parameters.items() if p.requires_grad}
    elif isinstance(gradients, str) and gradients != "all":
        raise CaptureError(f"gradients: expected 'wanted', 'all' or names of parameters, got {gradients!r}")
    elif gradients == "all":
        trainable = {name for name, p in parameters.items() if p.is_floating_point() or p.is_complex()}
    else:
        trainable = set(gradients)
        if unknown := trainable - set(parameters):
            raise CaptureError(f"gradients: {sorted(map(str, unknown))} are no parameters of the model")
    tensors = [_with_gradient(t, backward and (gradients == "all" or t.requires_grad)) for t in tensors]

    failure: GraphoptError | None = None
    for attempt in _attempts(size, gradients == "all"):
        provenance = Provenance(model)
        module = StepModule(model, layout, loss, trainable, provenance, accumulate)
        given = tensors if attempt.batch_gradients else [t.detach() for t in tensors]
        try:
            without = autocast(module.autocast, enabled=False)  # which forward enters by itself
            with unchanged(model, loss) as counted, provenance.recording(), torch.enable_grad(), without:
                joint = export_joint(
                    module, given, layout.batched, symbolic=attempt.symbolic, compiling=attempt.compiling
                )
            if counted:
                raise CaptureError(
                    f"the model's forward changes {', '.join(counted)}: a Python number, which a graph cannot follow; "
                    "make it a buffer, or count outside of the model"
                )
            graph = _training_graph(joint, module, layout, size)
            return Captured(graph, layout, module.output_spec, tuple(module.output_constants))
        except GraphoptError:
            raise
        except Exception as error:  # the model's own code ran: any exception is possible, the first is raised below
            failure = failure or _explained(error, provenance, model, tensors, layout, loss)
            if isinstance(failure, BatchError):
                break
    assert failure is not None
    raise failure


@dataclass(frozen=True)
class _Attempt:
    """One way to trace. ``compiling``: the model's code is told that it is being compiled, so that it leaves out what
    asks for the values of tensors (the mask checks of transformers)."""

    symbolic: bool
    compiling: bool = False
    batch_gradients: bool = True


def _attempts(size: int, all_gradients: bool) -> list[_Attempt]:
    """The plain trace with a symbolic batch first; what could make a failed one succeed after it: telling the model
    that it is compiled, a fixed batch size, no gradients of batch tensors (some operators refuse to give any)."""
    symbolic = [True, False] if size > 1 else [False]
    attempts = [_Attempt(s, compiling) for s in symbolic for compiling in (False, True)]
    if all_gradients:
        attempts += [replace(attempt, batch_gradients=False) for attempt in attempts]
    return attempts


def _check_arguments(model: Any, loss: Any, accumulate: int) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise CaptureError("model: TorchScript hides its operators; give the module it was made from")
    if loss is not None and loss != ModelLoss and not callable(loss):
        raise CaptureError(f"loss: expected a callable, None or {ModelLoss!r}, got {loss!r}")
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise CaptureError("loss: it has trainable parameters of its own; make it a submodule of the model")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise CaptureError(f"accumulate: expected a positive integer, got {accumulate!r}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise CaptureError(f"model: {name} is not initialized; call the model once on a batch before")


def _check_devices(model: nn.Module, tensors: Sequence[torch.Tensor], layout: BatchLayout) -> None:
    devices = {p.device for p in model.parameters()}
    for tensor, name in zip(tensors, layout.names, strict=True):
        if devices and tensor.device not in devices and tensor.dim():
            raise BatchError(
                f"batch: {name} is on {tensor.device}, the model on {', '.join(map(str, devices))}; move one with .to()"
            )


def _with_gradient(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(wanted and (tensor.is_floating_point() or tensor.is_complex()))


def _explained(
    error: Exception, provenance: Provenance, model: nn.Module, tensors: Sequence[torch.Tensor], layout: BatchLayout,
    loss: Any,
) -> GraphoptError:  # fmt: skip
    """The error of a failed trace as ours: BatchError if the model itself rejects the batch, else CaptureError."""
    place = f" in module {provenance.module!r}" if provenance.module else ""
    place += f" at {provenance.source}" if provenance.source else ""
    first_line = str(error).strip().split("\n")[0] or type(error).__name__
    if "expected to have an entirely functional graph" in first_line:
        first_line = (
            "a tensor that is neither a parameter nor a buffer is changed in place; make it a buffer (register_buffer)"
        )
    if isinstance(error, (RuntimeError, ValueError, TypeError, IndexError)) and _model_rejects(
        model, tensors, layout, loss
    ):
        shapes = [f"{n}: {t.dtype} {list(t.shape)}" for n, t in zip(layout.names, tensors, strict=True)]
        explained: GraphoptError = BatchError(
            f"batch: the model rejects it{place}: {first_line} (got {'; '.join(shapes)})"
        )
    else:
        explained = CaptureError(f"the step cannot be captured as one graph{place}: {first_line}")
    explained.__cause__ = error
    return explained


def _model_rejects(model: nn.Module, tensors: Sequence[torch.Tensor], layout: BatchLayout, loss: Any) -> bool:
    """Whether forward and loss fail by themselves: on fake tensors, and then really, since fake tensors refuse more."""
    from graphopt.graph.torch_internals import fails_on_fakes

    module = StepModule(model, layout, loss, (), Provenance(model))
    with unchanged(model, loss):
        return fails_on_fakes(module, tensors) and _fails(module, tensors)


def _fails(module: StepModule, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ``module(*tensors)`` raises. Writes go into copies of its buffers, random numbers are given back."""
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.func.functional_call(module, buffers, tuple(t.detach() for t in tensors))
    except Exception:  # the answer itself: the model's own code raised
        return True
    return False


_INPUT_KINDS = {"parameter": InputKind.PARAMETER, "buffer": InputKind.BUFFER, "batch": InputKind.BATCH}


def _training_graph(joint: ExportedJoint, module: StepModule, layout: BatchLayout, size: int) -> TrainingGraph:
    """The exported joint graph in our terms: named inputs and outputs, phases, places; the loss begins backward."""
    names = {"parameter": module.parameter_names, "buffer": module.buffer_names}

    def public(kind: str, name: str) -> str:
        return names[kind][name] if kind in names else layout.names[int(name)]

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    ones: list[fx.Node] = []
    differential: set[fx.Node] = set()  # tangents and all that backward computes
    constants: dict[str, torch.Tensor] = {}
    descriptors = iter(joint.inputs)
    for node in joint.module.graph.nodes:
        if node.op == "placeholder":
            kind, name = next(descriptors)
            if kind == "tangent":
                if module.loss is not None:
                    ones.append(node)  # the gradient of the loss by itself, made below
                    continue
                input_ = Input(InputKind.TANGENT, module.output_names[int(name)])
            else:
                input_ = Input(_INPUT_KINDS[kind], public(kind, name))
            prefix = {"tangent": "tangent_", "batch": "batch_"}.get(kind, "")
            copies[node] = graph.placeholder(prefix + input_.name.replace(".", "_"))
            copies[node].target = copies[node].name  # an identifier, which the name of a parameter need not be
            _set_meta(copies[node], node, Phase.INPUT)
            inputs.append(input_)
            if kind == "tangent":
                differential.add(copies[node])
            continue
        for tangent in [t for t in ones if t in node.all_input_nodes]:
            copies[tangent] = _ones(graph, tangent)
            ones.remove(tangent)
        if node.op == "output":
            results = node.args[0]
            continue
        if node.op == "get_attr":
            constants[str(node.target)] = _constant(joint.module, str(node.target))
        elif node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the step holds {node.target}, a higher-order operator that has no flat form")
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        backward = node.meta.get("partitioner_tag", "is_forward").endswith("backward")
        backward = backward or any(n in differential for n in copies[node].all_input_nodes)
        if backward:
            differential.add(copies[node])
        _set_meta(copies[node], node, Phase.BACKWARD if backward else Phase.FORWARD)
    outputs, nodes = [], []
    for (kind, name), result in zip(joint.outputs, results, strict=True):
        output = _output(kind, name, module, public) if result is not None else None
        if output is not None:
            outputs.append(output)
            nodes.append(copies[result])
            if kind == "parameter gradient":
                nodes[-1] = _laid_out(graph, copies[result], getattr(module, name))
    graph.output(tuple(nodes)).meta["phase"] = Phase.OUTPUT
    symbols = Symbols({"batch": joint.symbol} if joint.symbol is not None else {}, {"batch": size}, joint.guards)
    order = sorted(range(len(outputs)), key=lambda i: outputs[i].kind is not OutputKind.LOSS)  # the loss first
    graph.find_nodes(op="output")[0].args = (tuple(nodes[i] for i in order),)
    required = [n for n, p in module.model.named_parameters() if p.requires_grad]
    required += [n for n, flag in zip(layout.names, layout.requires_grad, strict=True) if flag]
    signature = Signature(tuple(inputs), tuple(outputs[i] for i in order), symbols, tree={"requires_grad": required})
    return TrainingGraph(graph, signature, constants)


def _output(kind: str, name: str, module: StepModule, public: Callable[[str, str], str]) -> Output | None:
    if kind == "output" and module.loss is not None:
        scaled = module.accumulate > 1 and name == "0"  # only there to start backward
        return None if scaled else Output(OutputKind.LOSS, "loss")
    if kind == "output":
        return Output(OutputKind.OUTPUT, module.output_names[int(name)])
    if kind == "buffer":
        return Output(OutputKind.BUFFER, public(kind, name))
    if kind.endswith("gradient"):
        return Output(OutputKind.GRADIENT, public(kind.removesuffix(" gradient"), name))
    raise CaptureError(f"the model writes into its {kind} {public(kind, name)!r} in place; clone it first")


def _ones(graph: fx.Graph, tangent: fx.Node) -> fx.Node:
    """The gradient of the loss by itself: a constant one. (A second, detached loss has no gradient.)"""
    value = tangent.meta["val"]
    node = graph.call_function(
        torch.ops.aten.full.default, (list(value.shape), 1.0), {"dtype": value.dtype, "device": value.device}
    )
    _set_meta(node, tangent, Phase.BACKWARD)
    return node


def _laid_out(graph: fx.Graph, gradient: fx.Node, parameter: torch.Tensor) -> fx.Node:
    """The gradient in the layout of its parameter, into which autograd copies it too (AccumulateGrad): fused updates
    count on it, and a norm over another layout is summed in another order."""
    value = gradient.meta["val"]
    if value.layout is not torch.strided:
        raise CaptureError(f"the gradient of a parameter of shape {list(parameter.shape)} is sparse")
    layouts = {f: torch.empty_like(parameter, device="meta", memory_format=f) for f in _formats(parameter)}
    wanted = next((f for f, like in layouts.items() if like.stride() == parameter.stride()), None)
    if wanted is None or value.stride() == parameter.stride():
        return gradient
    node = graph.call_function(torch.ops.aten.clone.default, (gradient,), {"memory_format": wanted})
    node.meta = {**gradient.meta, "phase": Phase.BACKWARD}
    node.meta["val"] = infer(node)
    return node


def _formats(tensor: torch.Tensor) -> list[torch.memory_format]:
    several = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *several.get(tensor.dim(), [])]


def _set_meta(node: fx.Node, origin: fx.Node, phase: Phase) -> None:
    place = origin.meta.get("custom") or {}
    node.meta = {
        "val": origin.meta.get("val"), "phase": phase,
        "module": place.get("module", ""), "source": place.get("source", ""),
    }  # fmt: skip


def _constant(module: fx.GraphModule, target: str) -> torch.Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(f"the step holds {target}, a {type(value).__name__}; only tensors can be constants")
    return value
