"""graphopt from where people already are: ``torch.compile``, the Hugging Face Trainer, Accelerate, Lightning.

- ``torch.compile(model, backend="graphopt")``: `graphopt.integrations.backend`.
- Accelerate and the Hugging Face Trainer know a closed list of backends; `register` adds ours to it.
- Lightning: `graphopt.integrations.lightning.GraphoptCallback`.
- `recording` tells what was done to each piece of a model, whoever compiled it.
"""

from graphopt.integrations.dynamo import PIECE_PASSES, backend
from graphopt.integrations.pieces import Piece, recording
from graphopt.integrations.registration import register

__all__ = ["PIECE_PASSES", "Piece", "backend", "recording", "register"]
