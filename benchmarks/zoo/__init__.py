"""The zoo: small but real architectures with random weights, for reach tests, benchmarks and tests.

Nothing is downloaded. Building a model imports the package it comes from, importing the zoo does not.

>>> from benchmarks import zoo
>>> case = zoo.case("mlp")
>>> model, batch = case.build(), case.batch(4)
>>> case.compute_loss(model, batch).shape
torch.Size([])
"""

from __future__ import annotations

from benchmarks.zoo import plain_models, timm_models, torchvision_models, transformers_models
from benchmarks.zoo._case import Case

__all__ = ["CASES", "Case", "case"]

CASES: tuple[Case, ...] = (
    *torchvision_models.CASES,
    *timm_models.CASES,
    *transformers_models.CASES,
    *plain_models.CASES,
)
"""Every architecture of the zoo, by family."""

_BY_NAME = {each.name: each for each in CASES}


def case(name: str) -> Case:
    """The case of this name.

    Raises:
        KeyError: there is none; the message lists the names.
    """
    if name not in _BY_NAME:
        raise KeyError(f"no case named {name!r} in the zoo; there are: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
