"""`Training`: the ready-made trial. Trains a net for some epochs and validates it, by loss, optimizer and data."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import ExplorationError
from graphopt.exploration.context import Context
from graphopt.exploration.fingerprints import digest_of, tensor_digest

__all__ = ["Training", "accuracy"]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of rows whose largest output is at the target.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return float((outputs.argmax(-1) == targets).float().mean())


class Training:
    """A trial from the parts of a training script. Gives ``accuracy`` (or what ``metric`` is called), the median
    ``step_seconds`` that were measured, and ``parameters``.

    Args:
        loss: ``loss(net(inputs), targets)``.
        optimizer: ``optimizer(net.parameters(), **options)``, as ``torch.optim.AdamW``. Hyper-parameters by the name of
            one of its arguments (``lr``, ``weight_decay`` ...) are handed on.
        data: inputs and targets to train on, tensors with the rows first.
        validation: the same to validate on.
        epochs: over the data; the final retraining takes more (`Context.effort`).
        batch: rows; a hyper-parameter ``batch`` goes before.
        metric: ``metric(outputs, targets)``, the larger the better.
        device: where it is trained; ``None``: on a GPU if there is one.

    Reports the metric after each epoch, so that trials can be stopped early, and keeps a checkpoint of each, from which
    another attempt goes on. A net with the weights of a supernet starts from these.
    """

    minimize = ()

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[..., torch.optim.Optimizer],
        data: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        *,
        epochs: int = 3,
        batch: int = 64,
        metric: Callable[[Tensor, Tensor], float] = accuracy,
        device: str | None = None,
    ):
        for name, pair in (("data", data), ("validation", validation)):
            if len(pair) != 2 or not all(isinstance(part, Tensor) and len(part) for part in pair):
                raise ExplorationError(f"{name}: expected a pair of tensors (inputs, targets) with rows")
            if len(pair[0]) != len(pair[1]):
                raise ExplorationError(f"{name}: {len(pair[0])} inputs, but {len(pair[1])} targets")
        for name, value in (("epochs", epochs), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ExplorationError(f"{name}: expected a positive integer, got {value!r}")
        self.loss, self.optimizer, self.metric = loss, optimizer, metric
        self.data, self.validation = data, validation
        self.epochs, self.batch, self.device = epochs, batch, device
        self.maximize = (getattr(metric, "__name__", "score"),)

    def digest(self) -> str:
        """What results count for: data, loss, optimizer and how long it is trained."""
        tensors = ",".join(tensor_digest(tensor) for tensor in (*self.data, *self.validation))
        parts = [digest_of(part) for part in (self.loss, self.optimizer, self.metric)]
        return f"{tensors};{parts};{self.epochs};{self.batch}"

    def options(self, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Those hyper-parameters that are arguments of the optimizer."""
        known = inspect.signature(self.optimizer).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        return {n: v for n, v in hyper_parameters.items() if n != "batch" and (anything or n in known)}

    def example(self, hyper_parameters: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """A batch, by which a step is priced."""
        rows = min(int(hyper_parameters.get("batch", self.batch)), len(self.data[0]))
        return self.data[0][:rows], self.data[1][:rows]

    def __call__(self, net: nn.Module, hyper_parameters: Mapping[str, Any], context: Context) -> dict[str, float]:
        """Train ``net`` and validate it."""
        if not isinstance(net, nn.Module):
            raise ExplorationError(f"Training: expected a module as the net, got {type(net).__name__}")
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # trials of this process before it had their own
        net = net.to(device)
        optimizer = self.optimizer(net.parameters(), **self.options(hyper_parameters))
        epochs = max(1, round(self.epochs * context.effort))
        score, seconds, done = 0.0, [], 0
        if (kept := context.load()) is not None:
            net.load_state_dict(kept["net"])
            optimizer.load_state_dict(kept["optimizer"])
            done, score, seconds = kept["epoch"], kept["score"], kept["seconds"]
            context.report(done, score)  # the attempt before may have ended before it was heard
        for epoch in range(done, epochs):
            net.train()
            for inputs, targets in self._batches(int(hyper_parameters.get("batch", self.batch)), context.seed + epoch):
                start = time.perf_counter()
                optimizer.zero_grad()
                self.loss(net(inputs.to(device)), targets.to(device)).backward()
                optimizer.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
            score = self._validate(net, device)
            context.save(
                {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "score": score,
                 "seconds": seconds[-200:]}
            )  # fmt: skip
            context.report(epoch + 1, score)
        measured = {
            self.maximize[0]: score,
            "step_seconds": median(seconds),
            "parameters": float(sum(p.numel() for p in net.parameters())),
        }
        if device.type == "cuda":
            measured["peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
        return measured

    def _batches(self, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows once, in another order each epoch; a last batch of one row, where there are others, is left out
        (batch norm refuses it)."""
        inputs, targets = self.data
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        for places in order.split(rows):
            if len(places) > 1 or rows == 1 or len(inputs) == 1:
                yield inputs[places], targets[places]

    def _validate(self, net: nn.Module, device: torch.device) -> float:
        net.eval()
        inputs, targets = self.validation
        with torch.no_grad():
            outputs = torch.cat([net(part.to(device)).cpu() for part in inputs.split(512)])
        return float(self.metric(outputs, targets))
