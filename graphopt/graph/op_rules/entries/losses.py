"""Softmax and losses."""

from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import gather as look
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import entry, never

# fmt: off
ENTRIES = (
    entry("_softmax _log_softmax _safe_softmax softmax log_softmax special_softmax special_log_softmax", "softmax",
          axes=pw.softmax, reduces=red.SOFTMAX),
    entry("_softmax_backward_data _log_softmax_backward_data", "softmax", axes=pw.softmax,
          reduces=red.along("sum", kept=True), linear="grad_output"),
    entry("cross_entropy_loss", "loss", axes=look.nll_loss, reduces=red.cross_entropy),
    entry("nll_loss_forward nll_loss2d_forward nll_loss nll_loss_nd nll_loss2d", "loss", axes=look.nll_loss,
          reduces=red.nll_loss),
    # the gradient goes to the targets' places: of the log-probabilities only the shape; reduction 1 is the mean
    entry("nll_loss_backward nll_loss2d_backward", "loss", axes=look.nll_loss_backward, reduces=red.nothing,
          linear="grad_output", reads={"self": never, "total_weight": lambda a: a.reduction == 1}),
    entry("mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits "
          "soft_margin_loss kl_div poisson_nll_loss", "loss", axes=pw.loss, reduces=red.loss),
    entry("multi_margin_loss multilabel_margin_loss_forward", "loss", axes=pw.ordered),
    entry("mse_loss_backward", "loss", axes=pw.pointwise, reduces=red.nothing, linear="grad_output | self + target"),
    entry("smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward",
          "loss", axes=pw.pointwise, reduces=red.nothing, linear="grad_output"),
    entry("multi_margin_loss_backward multilabel_margin_loss_backward", "loss", axes=pw.ordered, linear="grad_output"),
    entry("_ctc_loss", "loss", axes=look.ctc_loss),
    entry("_ctc_loss_backward", "loss", axes=look.ctc_loss, linear="grad"),
)
