"""Random numbers, values made from a shape alone, and numbers."""

from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import SHAPE_ONLY, entry

# fmt: off
ENTRIES = (
    entry("native_dropout", "random", axes=pw.first, draws=lambda a: a.train is not False),  # also for p = 0 and p = 1
    entry("native_dropout_backward", "pointwise", linear="grad_output"),
    entry("dropout feature_dropout alpha_dropout feature_alpha_dropout", "random", axes=pw.first,
          draws=lambda a: a.train and a.p != 0),
    entry("rrelu_with_noise rrelu_with_noise_functional", "random", axes=pw.pointwise, draws=lambda a: a.training),
    # in training the noise is the slope (RReLU draws it from [lower, upper])
    entry("rrelu_with_noise_backward", "pointwise", linear="grad_output",
          reads={"self": lambda a: not (a.training and a.upper - a.lower > 1e-6)}),
    entry("rand_like randn_like randint_like bernoulli.p uniform normal_functional exponential geometric cauchy "
          "log_normal random", "random", axes=pw.first, reads=SHAPE_ONLY),
    entry("bernoulli poisson normal _fused_dropout", "random", axes=pw.drawn),
    entry("multinomial", "random", axes=pw.multinomial),

    entry("zeros_like ones_like empty_like full_like zero fill", "factory", axes=pw.first, reads=SHAPE_ONLY),
    entry("copy", "factory", axes=pw.pointwise, reads=SHAPE_ONLY),
    entry("new_zeros new_ones new_empty new_full new_empty_strided", "factory", axes=pw.factory, reads=SHAPE_ONLY),
    entry("arange linspace logspace eye tril_indices triu_indices", "factory", axes=pw.positions),
    entry("zeros ones empty full rand randn randint scalar_tensor empty_strided randperm", "factory", axes=pw.factory),
    entry("sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous", "number", axes=pw.number,
          reads=SHAPE_ONLY),
    entry("_local_scalar_dense item", "number", axes=pw.number),
)
