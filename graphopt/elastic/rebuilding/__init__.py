"""Subnets as models of the user's own class: `rebuilt` gives one that computes what the written module computes.

There are two ways. A Hugging Face model is constructed anew from a configuration with the subnet's numbers
(`configurations`), so that it saves and loads like any other. Of another model a copy is made, with small tensors in
the place of the large ones (`copies`). What comes out is compared with the written module (`comparison`).
"""

from graphopt.elastic.rebuilding.rebuilt import rebuilt
from graphopt.elastic.rebuilding.refusal import NotRebuilt

__all__ = ["NotRebuilt", "rebuilt"]
