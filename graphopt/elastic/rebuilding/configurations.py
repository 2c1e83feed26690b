"""`from_configuration`: a Hugging Face model of the subnet's size, constructed from a configuration that says it.

A configuration has one number for all layers, so this works for subnets whose layers are alike and which keep the
first layers. Which field means what is told by its name (``hidden_size``, ``n_head``) and its value, the full size of
the dimensions that it stands for. What the class makes of the numbers is compared with the subnet afterwards.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind, Value
from graphopt.elastic.mode_states import ModeState
from graphopt.elastic.module_tree import all_tensors
from graphopt.elastic.rebuilding.refusal import NotRebuilt
from graphopt.elastic.space import Space

_FIELDS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    (r"(hidden_size|n_embd|d_model|embed_dim|emb_dim|^dim)$", (Kind.EMBEDDING,)),
    (r"^hidden_dim$", (Kind.EMBEDDING, Kind.WIDTH)),
    (r"(intermediate_size|ffn_dim|mlp_dim|^d_ff|^n_inner)$", (Kind.WIDTH,)),
    (r"(num_key_value_heads|num_kv_heads)$", (Kind.HEADS,)),
    (r"(attention_heads|^num_heads|^n_heads?)$", (Kind.HEADS, Kind.QUERIES)),
    (r"(hidden_layers|^num_layers|^n_layers?|encoder_layers|decoder_layers)$", (Kind.DEPTH,)),
)
"""Names of fields, and the kinds of dimensions that they count."""

_OWN = ("generation_config",)
"""What a model has beside its configuration and its tensors, and a user may have changed."""


def has_configuration(model: nn.Module) -> bool:
    """Whether a model is of a class that is constructed from a configuration alone and saves it."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def from_configuration(space: Space, choice: Choice, states: Mapping[bool, ModeState], written: nn.Module) -> nn.Module:
    """A model of the class of ``space.model`` with the tensors of ``written``.

    Raises:
        NotRebuilt: no configuration of the class says what the subnet is.
    """
    model: Any = space.model
    config = _configuration(space, choice)
    try:
        type(config).from_dict(config.to_dict())  # as loading it will: it checks which numbers go together
        made = type(model)(config)
    except Exception as error:  # classes check their configurations in many ways
        text = str(error).strip().partition("\n")[0]
        raise NotRebuilt(f"its constructor takes no such configuration: {type(error).__name__}: {text}") from error
    _fill(made, written)
    for name in _OWN:
        if hasattr(model, name):
            setattr(made, name, copy.deepcopy(getattr(model, name)))
    modules = dict(made.named_modules())
    for path, module in model.named_modules():
        if path in modules:
            modules[path].training = module.training
    return made


def _fill(made: nn.Module, written: nn.Module) -> None:
    """Give a model the tensors of the written module. Raises NotRebuilt where shapes or names differ."""
    small = dict(all_tensors(written, twice=True))
    for name, tensor in all_tensors(made):
        if name in small and tensor.shape == small[name].shape:
            tensor.data = small[name].detach().clone()
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(small[name].requires_grad)
        elif name in small or isinstance(tensor, nn.Parameter):
            there = tuple(small[name].shape) if name in small else "not read"
            raise NotRebuilt(f"by its configuration {name} would be {tuple(tensor.shape)}; in the subnet it is {there}")


def _configuration(space: Space, choice: Choice) -> Any:
    """The model's configuration with the numbers of the subnet."""
    before: Any = space.model.config
    config: Any = copy.deepcopy(before)
    fields = {name: value for name, value in config.to_dict().items() if _kinds(name)}
    active = [d for d in space.dimensions if d.name not in choice.inactive]
    depths: dict[int, int] = {}
    for name, value in fields.items():
        full = value if value is not None else _unsaid(name, before)
        if type(full) is not int:
            continue
        mine = [d for d in active if _concerns(name, d, fields)]
        new = _number(name, full, mine, choice, before)
        if new != full:
            setattr(config, name, new)
            if Kind.DEPTH in _kinds(name):
                depths[full] = new
    for name, value in config.to_dict().items():  # what there is of each layer, such as `layer_types`
        if isinstance(value, (list, tuple)) and len(value) in depths and "layer" in name:
            setattr(config, name, value[: depths[len(value)]])
    return config


def _kinds(field: str) -> tuple[Kind, ...]:
    return next((kinds for pattern, kinds in _FIELDS if re.search(pattern, field)), ())


def _unsaid(field: str, config: Any) -> int | None:
    """What a field means that is None: four times the width for the hidden features of GPT-2 and its kin."""
    return 4 * int(config.hidden_size) if re.search(r"n_inner|ffn_dim|intermediate_size", field) else None


def _concerns(field: str, dimension: Dimension, fields: Collection[str]) -> bool:
    """Whether a field is about a dimension: where there are fields for encoder and decoder, by where that is."""
    behind = any("decoder" in path.split(".") for path in dimension.where)
    if "decoder" in field:
        return behind
    both = any("decoder" in other and _kinds(other) == _kinds(field) for other in fields)
    return not (both and behind) or dimension.kind is Kind.EMBEDDING


def _number(field: str, full: int, dimensions: list[Dimension], choice: Choice, config: Any) -> int:
    """What a field becomes."""
    kinds = _kinds(field)
    if kinds == (Kind.HEADS, Kind.QUERIES):
        groups = _groups(config, full)
        heads = _common(field, Kind.HEADS, groups, dimensions, choice)
        return heads * _common(field, Kind.QUERIES, full // groups, dimensions, choice)
    for kind in kinds:
        if any(d.kind is kind and d.full == full for d in dimensions):
            return _common(field, kind, full, dimensions, choice)
    return full


def _groups(config: Any, heads: int) -> int:
    """How many heads have keys and values of their own."""
    for name in ("num_key_value_heads", "num_kv_heads"):
        groups = getattr(config, name, None)
        if type(groups) is int and groups and heads % groups == 0:
            return groups
    return heads


def _common(field: str, kind: Kind, full: int, dimensions: list[Dimension], choice: Choice) -> int:
    """What all dimensions of a kind and size are; what no dimension can change is full."""
    found: dict[int, str] = {}
    for d in dimensions:
        if d.kind is kind and d.full == full:
            found[_count(choice[d.name], d)] = d.name
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise NotRebuilt(f"{first} is {one} and {second} is {other}, where its configuration has one {field}")
    return next(iter(found), full)


def _count(value: Value, dimension: Dimension) -> int:
    if isinstance(value, int):
        return value
    if value != tuple(range(len(value))):
        raise NotRebuilt(f"of {dimension.name} the layers {value} remain; the class would give them other names")
    return len(value)
