"""Functional collectives."""

from graphopt.graph.op_rules.axis_rules import communication as com
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import entry

# fmt: off
ENTRIES = (
    entry("_c10d_functional::all_reduce _c10d_functional::wait_tensor _c10d_functional::broadcast "
          "_c10d_functional::isend", "communication", axes=pw.first),
    entry("_c10d_functional::all_reduce_coalesced", "communication", axes=com.each(com.same)),
    entry("_c10d_functional::all_gather_into_tensor", "communication", axes=com.one(com.all_gather)),
    entry("_c10d_functional::all_gather_into_tensor_coalesced", "communication", axes=com.each(com.all_gather)),
    entry("_c10d_functional::reduce_scatter_tensor", "communication", axes=com.one(com.reduce_scatter)),
    entry("_c10d_functional::reduce_scatter_tensor_coalesced", "communication", axes=com.each(com.reduce_scatter)),
    entry("_c10d_functional::all_to_all_single", "communication", axes=com.one(com.all_to_all)),
)
