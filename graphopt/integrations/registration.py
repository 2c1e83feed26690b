"""`register`: the name ``"graphopt"`` where names of backends are looked up."""

from __future__ import annotations

import enum
from importlib.util import find_spec
from typing import Any

from graphopt.integrations.aot import register_with_dynamo
from graphopt.integrations.dynamo import backend

NAME = "graphopt"


def register() -> None:
    """Make ``"graphopt"`` a backend that torch, and Accelerate where it is installed, know by name.

    ``torch.compile`` finds an installed graphopt by itself, by its entry point; a checkout without installation needs
    this call. Accelerate checks the name against an enumeration of its own (`accelerate.utils.DynamoBackend`), to which
    ours is added here: for ``Accelerator(dynamo_backend="graphopt")``, ``TorchDynamoPlugin(backend="graphopt")`` and
    the Hugging Face Trainer's ``TrainingArguments(torch_compile_backend="graphopt")``, which go through it. Call it
    once, before those; again does nothing.

    >>> import graphopt.integrations, torch
    >>> graphopt.integrations.register()
    >>> "graphopt" in torch.compiler.list_backends()
    True
    """
    register_with_dynamo(NAME, backend)
    if find_spec("accelerate") is not None:
        from accelerate.utils import DynamoBackend

        _admit(DynamoBackend, NAME.upper())


def _admit(names: type[enum.Enum], name: str) -> None:
    """Let ``names(name)`` be a member of an enumeration of strings whose members are called as their values.

    By ``_missing_``, which `enum` asks for a value that it does not know. The member is made once: Accelerate copies
    and compares it.
    """
    if name in {member.value for member in names} or getattr(names, f"_{name}_admitted", None) is not None:
        return
    member: Any = str.__new__(names, name)  # type: ignore[type-var]
    member._name_ = member._value_ = name
    asked_before = names._missing_

    def missing(cls: type[enum.Enum], value: object) -> Any:
        return member if value == name else asked_before(value)

    setattr(names, f"_{name}_admitted", member)
    names._missing_ = classmethod(missing)  # type: ignore[assignment]
