"""The backend ``torch.compile(model, backend="graphopt")``.

Dynamo cuts the user's code into pieces at what it cannot trace. Each piece is captured with its backward by
AOTAutograd, rewritten by passes on the joint graph, and lowered: to flat code of eager's own kernels (the default: bits
of eager, no compilation), or by Inductor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

import graphopt
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.lowering import lower
from graphopt.graph.provenance import line_of
from graphopt.graph.training_graph import Input, InputKind
from graphopt.integrations.aot import compile_eager, compile_inductor, with_boxed_code
from graphopt.integrations.joint import as_training_graph, path_of
from graphopt.integrations.pieces import optimized
from graphopt.passes import ConstantFolding, GradientLiveness, Pass
from graphopt.step import PASSES

PIECE_PASSES: tuple[Pass, ...] = (GradientLiveness(), *PASSES)
"""What runs on each piece: gradients that nobody reads, then the passes of `graphopt.optimize`. All are exact."""

LOWERINGS = ("eager", "inductor")


def backend(
    piece: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one piece; Dynamo calls it. The entry point ``graphopt`` of ``torch_dynamo_backends``.

    Args:
        piece: operators of torch between two graph breaks.
        inputs: its inputs, fake tensors and symbolic sizes.
        options: what the user gave as ``torch.compile(..., options={...})``:

            - ``"lower"``: ``"eager"`` (default) runs eager's kernels as flat code and gives eager's bits;
              ``"inductor"`` fuses them, with sums in another order and random numbers as in eager.
            - ``"passes"``: what runs on the joint graph, in order; by default `PIECE_PASSES`. For Inductor, which takes
              no graph with new constants and folds them itself, without `ConstantFolding`.
            - ``"inductor"``: a dict of Inductor's own options.
        mode: of ``torch.compile``; Inductor's. None with eager's kernels.

    Raises:
        GraphoptError: an option that there is not (Dynamo wraps it in a BackendCompilerFailed).
    """
    chosen = Options.parse(options, mode)
    rewrite = partial(optimized, name=_name(piece), inputs=_inputs(piece, inputs), passes=chosen.passes)
    if chosen.lower == "eager":
        return compile_eager(piece, inputs, rewrite=rewrite, compile_half=_flat)
    return compile_inductor(piece, inputs, rewrite=rewrite, key=chosen.key(), options=chosen.inductor)


@dataclass(frozen=True)
class Options:
    """``options=`` and ``mode=`` of ``torch.compile``, checked; see `backend`."""

    lower: str = "eager"
    passes: tuple[Pass, ...] = PIECE_PASSES
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Raises GraphoptError for what is unknown or does not go together."""
        given = dict(options or {})
        if unknown := sorted(set(given) - {"lower", "passes", "inductor"}):
            raise GraphoptError(
                f"options: {', '.join(map(repr, unknown))} unknown; expected some of 'lower', 'passes' and 'inductor' "
                "(Inductor's own options go in there: options={'lower': 'inductor', 'inductor': {...}})"
            )
        lower = given.get("lower", "eager")
        if lower not in LOWERINGS:
            raise GraphoptError(f"options: 'lower' is {lower!r}, expected one of {LOWERINGS}")
        passes = tuple(given.get("passes", PIECE_PASSES))
        if not all(isinstance(one, Pass) for one in passes):
            raise GraphoptError(f"options: 'passes' is {given['passes']!r}, expected objects of graphopt.passes.Pass")
        if lower == "inductor":
            passes = tuple(one for one in passes if not isinstance(one, ConstantFolding))
        inductor = dict(given.get("inductor", {}))
        if mode is not None:
            inductor = {**torch._inductor.list_mode_options(mode), **inductor}
        if lower == "eager" and (mode is not None or inductor):
            what = f"mode={mode!r}" if mode is not None else "'inductor'"
            raise GraphoptError(f"{what} is for Inductor; give options={{'lower': 'inductor'}} too, or leave it out")
        return cls(lower, passes, inductor)

    def key(self) -> str | None:
        """What compiled code depends on besides the graph, for Inductor's caches; None if that cannot be told."""
        if any(not type(one).__module__.startswith("graphopt.passes") for one in self.passes):
            return None  # a pass of the user's own: its code may change
        return hashlib.sha256(f"{graphopt.__version__} {_code_digest()} {self.passes!r}".encode()).hexdigest()


@cache
def _code_digest() -> str:
    """A digest of this library's code that rewrites graphs."""
    digest = hashlib.sha256()
    home = Path(graphopt.__file__).parent
    for folder in ("passes", "graph", "integrations"):
        for file in sorted((home / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _flat(half: fx.GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
    """A half as flat code, which frees each value after its last use; by torch's own code what is no graph of ours."""
    try:
        converted = as_training_graph(half)
    except CaptureError:  # the piece was reported, with the reason, when passes looked at it
        return with_boxed_code(half)
    run = lower(converted.graph, in_place=False, boxed=True).run
    if len(converted.results) == len(converted.graph.outputs):
        return run
    return lambda arguments: converted.complete(run(arguments))  # type: ignore[arg-type]


def _name(piece: fx.GraphModule) -> str:
    """Dynamo's number of a piece, and the line of the user's code where it begins."""
    number = piece.meta.get("dynamo_compile_id")
    lines = (line_of(n.meta.get("stack_trace") or "") for n in piece.graph.nodes if n.op != "placeholder")
    begins = next(filter(None, lines), "")
    return f"{number if number is not None else '?'}" + (f" ({begins})" if begins else "")


def _inputs(piece: fx.GraphModule, inputs: Sequence[Any]) -> list[Input]:
    """What the inputs of a piece are to the user, in order."""
    found = []
    for node, value in zip(piece.graph.find_nodes(op="placeholder"), inputs, strict=True):
        source = getattr(getattr(node, "_dynamo_source", None), "name", "") or ""
        kind = InputKind.BATCH
        if isinstance(value, torch.nn.Parameter):
            kind = InputKind.PARAMETER
        elif "._buffers[" in source:
            kind = InputKind.BUFFER
        found.append(Input(kind, path_of(source) or str(node.target)))
    return found
