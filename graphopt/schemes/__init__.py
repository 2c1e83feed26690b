"""Ways to run a training step on given processors, one scheme a file."""

from collections.abc import Callable

from graphopt.schemes.base import Prepared, Runner, Scheme
from graphopt.schemes.candidates import candidates
from graphopt.schemes.cuda_graphs import CudaGraphs
from graphopt.schemes.data_parallel import DataParallel
from graphopt.schemes.data_parallel import data_parallel as _data_parallel
from graphopt.schemes.eager import Eager
from graphopt.schemes.flat import Flat
from graphopt.schemes.hybrid import Hybrid
from graphopt.schemes.hybrid import hybrid as _hybrid
from graphopt.schemes.inductor import Inductor
from graphopt.schemes.micro_batches import MicroBatches
from graphopt.schemes.task import ModelWatch, Task

SCHEMES: dict[str, Scheme] = {scheme.kind: scheme for scheme in (Flat(), Eager(), Inductor(), CudaGraphs())}
"""The schemes on one processor by name, without options."""

SHARED_SCHEMES: dict[str, Callable[[int, str], Scheme]] = {
    DataParallel.kind: lambda processors, batch_norm: _data_parallel(processors, batch_norm)[0],
    Hybrid.kind: _hybrid,
}
"""The schemes on several processors by name, made from their number and ``batch_norm``."""

EXACT = ("flat", "eager")
"""What ``schemes="exact"`` takes: schemes that compute eager's bits. ``"auto"`` takes `candidates`."""

__all__ = [
    "EXACT",
    "SCHEMES",
    "SHARED_SCHEMES",
    "CudaGraphs",
    "DataParallel",
    "Eager",
    "Flat",
    "Hybrid",
    "Inductor",
    "MicroBatches",
    "ModelWatch",
    "Prepared",
    "Runner",
    "Scheme",
    "Task",
    "candidates",
]
