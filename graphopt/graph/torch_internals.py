"""The one place where private parts of torch are imported. A new torch release is this file's work."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The fake tensor mode of the first fake tensor found in ``values`` (any nesting), None if there is none."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None
