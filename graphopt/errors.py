"""The errors and the warning of graphopt.

Every error is raised *before* anything was changed: after it, the model, the optimizer and the graph are
what they were. A message names the argument, what came, what was expected, and what to do about it.
"""


class GraphoptError(Exception):
    """The common base: ``except graphopt.GraphoptError`` catches whatever the library raises on purpose."""


class CaptureError(GraphoptError):
    """Raised by ``capture`` when a model, loss or optimizer cannot become one graph.

    Typical causes are control flow that depends on the values of tensors, calls to ``.item()``, and
    operators without a traceable form. The message names the module path and the source line.
    ``optimize`` does not raise it: it falls back to eager with one :class:`GraphoptWarning`.
    """


class LossError(GraphoptError):
    """Raised when backward cannot start from what the loss gives.

    It is no scalar, no floating-point number, or depends on no parameter that requires grad. Eager would fail in the
    same way, so there is no fallback.
    """


class BatchError(GraphoptError):
    """Raised when a batch does not fit the model or the graph.

    The shape, dtype, device or nesting differs from what was captured and cannot be captured anew, or
    a dimension has size 0.
    """


class OptimizerError(GraphoptError):
    """Raised when an optimizer does not belong to the model.

    For example, it owns no parameter of the model, or the same parameter is owned by two optimizers.
    """


class StaleGraphError(GraphoptError):
    """Raised when a graph no longer describes its model.

    A parameter or buffer was deleted, replaced by one of another shape or dtype, or moved to another
    device. What can be followed without risk (``requires_grad``, train/eval mode, parameter groups) is
    planned anew instead.
    """


class LoadError(GraphoptError):
    """Raised by ``TrainingGraph.load`` when a file cannot be used here.

    It is damaged, was written in another format or by another torch version whose operators differ, or
    its signature does not fit the model it is to be bound to. Loading never runs code from the file.
    """


class PassError(GraphoptError):
    """Raised when a pass returned a graph that breaks an invariant of the IR.

    Invariants are: the graph lints, and every node's shape, dtype, aliasing and the order of mutations are
    consistent. The fault is the pass's, not the user's; the graph given to the pass is untouched. The check
    that notices it may not know which pass is at work: whoever runs the pass then sets ``pass_name``.

    >>> raise PassError("node 'view_3' has shape (2, 3), its user expects (3, 2)", pass_name="no_ops")
    Traceback (most recent call last):
    ...
    graphopt.errors.PassError: pass 'no_ops': node 'view_3' has shape (2, 3), its user expects (3, 2)
    """

    def __init__(self, message: str, *, pass_name: str | None = None) -> None:
        """Says which invariant was broken (``message``) and by which pass, where that is known."""
        super().__init__(message)
        self.message = message
        self.pass_name = pass_name

    def __str__(self) -> str:
        return self.message if self.pass_name is None else f"pass {self.pass_name!r}: {self.message}"


class VerificationError(GraphoptError):
    """Raised when a graph, or another form of a step, does not compute what eager computes.

    Outputs, gradients, new buffers or new parameters differ from eager's by more than eager itself
    differs from a float64 reference. The message names the first value that differs and by how much.
    """


class WorkerError(GraphoptError):
    """Raised when a step on several processors was not made, or its workers could not be started.

    A worker died, hung, ran out of memory, or its part of the batch made an operator fail. The message names the
    processor and the cause. Parameters, buffers, optimizer state and random numbers are those before the step, and no
    worker is left running.
    """


class RankError(GraphoptError):
    """Raised when the ranks of a `torch.distributed` world cannot take a step together.

    One is gone, has failed or did not answer within the timeout of the group, or ranks are in different states (other
    batches, modes, options of an optimizer). On this rank the model is that before the step.
    """


class GraphoptWarning(UserWarning):
    """Given once for each cause when graphopt does less than it was asked to.

    Most often it runs a step in eager mode. It says what could not be done, where, and what would help.
    ``warnings.simplefilter("error", graphopt.GraphoptWarning)`` turns every fallback into an error.
    """


class AxisError(GraphoptError):
    """Axes cannot be found, or a request about them cannot be met."""


class CostModelError(GraphoptError):
    """Raised when a price cannot be given or kept.

    For example, a machine is not known, a measurement is not a positive number of seconds, a profile store was
    written by a newer version of the library, or a fit was asked for more than its rows can carry.
    """


class ElasticError(GraphoptError):
    """Raised when a model cannot be made elastic as asked, or a choice is outside of its space.

    For example, nothing in the model is elastic, a pattern names no dimension, a dimension cannot have the size that
    was chosen, or a weight is used in two places that cannot have one size.
    """


class ExplorationError(GraphoptError):
    """Raised by ``graphopt.explore`` and what belongs to it: an argument is wrong, or the study cannot go on."""


class StoreError(ExplorationError):
    """Raised when the file of a study cannot be used as it is.

    It is damaged, read-only, locked by another process, of another study, or the disk is full. Nothing of it is ever
    dropped in silence: the message says what is there and what can be done.
    """


class BudgetTooTight(ExplorationError):
    """Raised when no model that was looked at is predicted to fit the budget.

    Attributes:
        nearest: what the model nearest to it is like, as text.
        needs: what that model is predicted to need, by the names of the budget.
    """

    def __init__(self, message: str, nearest: str = "", needs: dict[str, float] | None = None) -> None:
        """``message`` says all of it; the parts are kept for programs."""
        super().__init__(message)
        self.nearest = nearest
        self.needs = dict(needs or {})
