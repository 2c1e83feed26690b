"""Ways to run a training step on given processors, one scheme a file."""

from graphopt.schemes.base import Prepared, Runner, Scheme
from graphopt.schemes.candidates import candidates
from graphopt.schemes.cuda_graphs import CudaGraphs
from graphopt.schemes.data_parallel import DataParallel
from graphopt.schemes.eager import Eager
from graphopt.schemes.flat import Flat
from graphopt.schemes.hybrid import Hybrid
from graphopt.schemes.inductor import Inductor
from graphopt.schemes.micro_batches import MicroBatches
from graphopt.schemes.task import ModelWatch, Task

SCHEMES: dict[str, Scheme] = {scheme.kind: scheme for scheme in (Flat(), Eager(), Inductor(), CudaGraphs(), Hybrid())}
"""The schemes by name, without options."""

EXACT = ("flat", "eager")
"""What ``schemes="exact"`` takes: schemes that compute eager's bits. ``"auto"`` takes `candidates`."""

__all__ = [
    "EXACT",
    "SCHEMES",
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
