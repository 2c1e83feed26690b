"""`GraphoptCallback`: steps of a LightningModule through the backend, for the time of a fit.

Needs the extra ``graphopt[lightning]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; pip install 'graphopt[lightning]'", name=error.name) from error

from graphopt.errors import GraphoptError
from graphopt.integrations.dynamo import Options, backend

_LOGGING = ("log", "log_dict")
"""What a step calls that is no part of the graph and reads the state of the trainer, which changes with every batch:
Dynamo would compile the step anew for each state, and give up after eight."""


class GraphoptCallback(Callback):
    """Runs the steps of a LightningModule by ``torch.compile(..., backend="graphopt")`` while it is fitted.

    Forward, loss and all else that a step computes is compiled; what it logs runs as before. The module itself is not
    wrapped: names of parameters, and so checkpoints, are those of the plain module. After the fit, or where it fails,
    its steps are the plain ones again.

    Args:
        steps: names of the methods to compile; ``("training_step", "validation_step")`` compiles both.
        fullgraph, dynamic: as of ``torch.compile``.
        options, mode: see `graphopt.integrations.backend`.

    Raises:
        GraphoptError: an option that there is not; at ``fit``, a module that is compiled already or has no such step.

    Example::

        trainer = lightning.Trainer(callbacks=[GraphoptCallback()])
        trainer.fit(module, loader)
    """

    def __init__(
        self,
        steps: Sequence[str] = ("training_step",),
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        options: dict[str, Any] | None = None,
        mode: str | None = None,
    ):
        if isinstance(steps, str):
            raise GraphoptError(f"steps: expected names of methods such as ('training_step',), got {steps!r}")
        Options.parse(options, mode)  # what is wrong is said here, not by Dynamo amid the first step
        self._steps = tuple(steps)
        self._compile: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": dynamic, "options": options, "mode": mode}
        self._replaced: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put compiled steps in place of the module's, where it is going to be fitted."""
        if stage != "fit":
            return
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise GraphoptError(
                f"{type(pl_module).__name__} is compiled already: give the trainer the plain module, or leave "
                "this callback out and compile with backend='graphopt'"
            )
        if missing := [name for name in self._steps if not callable(getattr(pl_module, name, None))]:
            raise GraphoptError(f"steps: {type(pl_module).__name__} has no {', '.join(missing)}")
        for name in self._steps:
            self._replace(pl_module, name, torch.compile(getattr(pl_module, name), backend=backend, **self._compile))
        for name in _LOGGING:
            self._replace(pl_module, name, torch.compiler.disable(getattr(pl_module, name)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its plain steps back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call then."""
        self._restore(pl_module)

    def _replace(self, module: LightningModule, name: str, method: Any) -> None:
        self._replaced[name] = module.__dict__.get(name)
        module.__dict__[name] = method

    def _restore(self, module: LightningModule) -> None:
        for name, own in self._replaced.items():
            if own is None:  # it came from the class
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = own
        self._replaced.clear()
