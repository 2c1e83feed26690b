"""Torch-Pruning on the same models, without configuration, beside spaces: the part ``peers`` of `benchmarks.elastic`.

It is no dependency of graphopt: ``pip install torch-pruning``. Each model is cut to half its width in a process of its
own, which is ended when it takes too long.

Whether it is right is asked of single groups. Where a group holds no norm over its channels, a model whose channels
are zero computes what a model without them computes; the peer's groups are compared that way (an upper bound: groups
with norms are not looked at). A model that runs may thus be wrong: heads whose borders are cut.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from multiprocessing import get_context
from queue import Empty
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks import zoo
from benchmarks.elastic_subnets import Row, half
from benchmarks.measure import interleaved
from graphopt.elastic import space as make_space
from tests.axes_oracles import wide

PEERS = (
    "resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2", "convnext_tiny", "vit_small", "swin_small", "bert",
    "gpt2", "llama", "t5",
)  # fmt: skip
GROUPS = 6
"""Groups of a model that are looked at."""


def peers(names: Sequence[str], seconds: float, rounds: int) -> list[Row]:
    """Rows: what became of each model, by the peer and by a space, and how fast its steps are."""
    rows = []
    for name in names:
        row = _in_time(name, rounds, seconds)
        rows.append({"model": name, **row})
    return rows


def _in_time(name: str, rounds: int, seconds: float) -> Row:
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_put, args=(results, name, rounds), daemon=True)
    process.start()
    try:
        found: Row = results.get(timeout=seconds)
    except Empty:
        found = {"note": f"neither was done within {seconds:.0f} s"}
    process.terminate()
    process.join()
    return found


def _put(results: Any, name: str, rounds: int) -> None:
    """One model, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        results.put(_compared(name, rounds))
    except Exception as error:  # the table tells it
        results.put({"note": f"benchmark failed: {type(error).__name__}: {error}"})


def _compared(name: str, rounds: int) -> Row:
    case = zoo.case(name)
    torch.manual_seed(0)
    model = wide(case.build()).float().eval()  # untrained attention is uniform, which hides errors
    batch = case.batch(8)
    inputs = batch if isinstance(batch, dict) else batch[:-1]
    whole = sum(p.numel() for p in model.parameters())

    start = perf_counter()
    space = make_space(model, inputs)
    ours = space.extract(half(space))
    row: Row = {"graphopt seconds": perf_counter() - start, "graphopt parameters": _size(ours) / whole}
    nets = {"full": model, "graphopt": ours}

    start = perf_counter()
    try:
        theirs = _pruned(model, inputs)
        row["peer seconds"] = perf_counter() - start
        row["peer parameters"] = _size(theirs) / whole
        _run(theirs, inputs)
        nets["torch-pruning"] = theirs
        row["torch-pruning"] = _verdict(model, inputs)
    except Exception as error:  # what a peer raises is a result
        text = str(error).strip().partition("\n")[0][:80]
        row["torch-pruning"] = f"{type(error).__name__}: {text}"
    steps = {way: _step(net, inputs) for way, net in nets.items()}
    for timing in interleaved(steps, rounds=rounds, warmup=2)[1:]:
        row[f"{timing.name} times as fast"] = 1 / timing.ratio
    return row


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _step(model: nn.Module, inputs: Any) -> Any:
    """Forward and backward of the sum of all outputs."""

    def step() -> None:
        model.zero_grad()
        sum(t.float().sum() for t in _run(model, inputs) if t.requires_grad).backward()  # type: ignore[union-attr]

    return step


# -- the peer ---------------------------------------------------------------------------------------------------------


def _pruned(model: nn.Module, inputs: Any) -> nn.Module:
    """Half of the width, as its documentation has it, but for what it says of single models."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    last = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    pruner = tp.pruner.BasePruner(
        small, inputs, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[last]
    )
    pruner.step()
    return small


def _verdict(model: nn.Module, inputs: Any) -> str:
    """What some of its groups do: a group's channels at zero against the group removed."""
    import torch_pruning as tp

    count = len(_groups(tp, copy.deepcopy(model), inputs)[1])
    looked = right = 0
    for at in range(0, count, max(1, count // GROUPS)):
        removed = copy.deepcopy(model)
        graph, groups = _groups(tp, removed, inputs)
        root, handler = groups[at][0].dep.target.module, groups[at][0].dep.handler
        channels = graph.get_out_channels(root)
        group = graph.get_pruning_group(root, handler, list(range(channels // 2, channels)))
        zeroed = _zeroed(tp, graph, group, copy.deepcopy(model))
        if zeroed is None:
            continue
        group.prune()
        looked += 1
        with torch.no_grad():
            pairs = zip(_run(removed, inputs), _run(zeroed, inputs), strict=True)
            right += all(a.shape == b.shape and _near(a, b) for a, b in pairs)
    if not looked:
        return "runs (no group could be checked)"
    return f"{right} of {looked} groups right" + ("" if right == looked else ": WRONG")


def _groups(tp: Any, model: nn.Module, inputs: Any) -> tuple[Any, list[Any]]:
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    return graph, list(graph.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]))


def _zeroed(tp: Any, graph: Any, group: Any, model: nn.Module) -> nn.Module | None:
    """The model with the channels of a group at zero; None where a norm over channels would see them."""
    modules = dict(model.named_modules())
    for dep, indices in group:
        module = dep.target.module
        if not isinstance(module, nn.Module) or isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            return None
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            if list(module.parameters(recurse=False)):
                return None
            continue
        if not graph.is_out_channel_pruning_fn(dep.handler):
            continue
        twin = modules[graph._module2name[module].split(" ")[0]]
        with torch.no_grad():
            for tensor in (twin.weight, twin.bias):
                if isinstance(tensor, torch.Tensor):
                    tensor[[int(i) for i in indices]] = 0
    return model


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, 1e-3, 1e-3 * float(b.abs().max()))
