"""Gather and scatter: reads and writes at places that data or numbers name."""

from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import cuts, views
from graphopt.graph.op_rules.axis_rules import gather as look
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import entry

# fmt: off
ENTRIES = (
    entry("embedding", "gather", axes=look.embedding, reduces=red.nothing, linear="weight", gathers="weight"),
    entry("embedding_dense_backward", "scatter", axes=look.embedding_backward, reduces=red.embedding_backward,
          linear="grad_output"),
    entry("embedding_bag _embedding_bag _embedding_bag_forward_only", "gather", axes=look.embedding_bag),
    entry("_embedding_bag_backward _embedding_bag_dense_backward", "scatter", axes=look.embedding_bag_backward,
          linear="grad"),
    entry("_embedding_bag_per_sample_weights_backward", "scatter", axes=pw.ordered, linear="grad"),
    entry("index _unsafe_index", "gather", axes=look.index, reduces=red.nothing, linear="self", gathers="self"),
    entry("gather", "gather", axes=look.gather, reduces=red.nothing, linear="self", gathers="self"),
    entry("index_select", "gather", axes=look.index_select, reduces=red.nothing, linear="self", gathers="self"),
    entry("index_put _unsafe_index_put", "scatter", axes=look.index_put, linear="self + values"),
    entry("index_add index_copy", "scatter", axes=look.index_add, linear="self + source"),
    entry("index_fill", "scatter", axes=look.index_fill, reduces=red.nothing),
    entry("masked_scatter_backward", "scatter", axes=pw.ordered, linear="grad_output"),
    entry("masked_scatter", "scatter", axes=pw.ordered, linear="self + source"),
    entry("scatter", "scatter", axes=look.scatter, linear="self + src + value"),
    entry("scatter.reduce scatter.value_reduce scatter_reduce", "scatter", axes=look.scatter),
    entry("scatter_add", "scatter", axes=look.scatter, linear="self + src"),
    entry("slice_scatter", "scatter", axes=cuts.slice_scatter, reduces=red.nothing, linear="self + src"),
    entry("select_scatter", "scatter", axes=cuts.select_scatter, reduces=red.nothing, linear="self + src"),
    entry("as_strided_scatter", "scatter", axes=views.as_strided_scatter, reduces=red.nothing, linear="self + src"),
    entry("diagonal_scatter", "scatter", axes=pw.ordered, reduces=red.nothing, linear="self + src"),
    entry("slice_backward", "scatter", axes=cuts.slice_backward, reduces=red.nothing, linear="grad_output"),
    entry("select_backward", "scatter", axes=cuts.select_backward, reduces=red.nothing, linear="grad_output"),
    entry("diagonal_backward", "scatter", axes=pw.ordered, reduces=red.nothing, linear="grad_output"),
    entry("unfold_backward", "scatter", axes=views.unfold_backward, linear="grad_in"),
    entry("nonzero masked_select", "gather", axes=pw.ordered),
)
