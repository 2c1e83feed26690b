"""What each ATen operator costs, reads, and is: one table (`RULES`) and the queries that apply it to a node."""

from graphopt.graph.op_rules.arguments import operand, operand_names, operand_nodes, set_operand
from graphopt.graph.op_rules.masked_forms import MaskedForm
from graphopt.graph.op_rules.op_rule import OpRule
from graphopt.graph.op_rules.queries import (
    OutputMask,
    bytes_moved,
    flops,
    is_pointwise,
    is_pure,
    is_random,
    linear_in,
    linear_sets,
    masked_form,
    nodes_read,
    output_mask,
    reads,
    reductions,
    rule,
    with_output_mask,
    zero_if,
)
from graphopt.graph.op_rules.reductions import Reduction
from graphopt.graph.op_rules.table import NAMED, RULES

__all__ = [
    "NAMED", "RULES", "MaskedForm", "OpRule", "OutputMask", "Reduction", "bytes_moved", "flops", "is_pointwise",
    "is_pure", "is_random", "linear_in", "linear_sets", "masked_form", "nodes_read", "operand", "operand_names",
    "operand_nodes", "output_mask", "reads", "reductions", "rule", "set_operand", "with_output_mask", "zero_if",
]  # fmt: skip
