"""Views, and copies that move elements without looking at them: linear, nothing is computed."""

from graphopt.graph.op_rules.axis_rules import cuts, views
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import entry

# fmt: off
ENTRIES = (
    entry("view _unsafe_view reshape flatten unflatten view_as reshape_as _reshape_alias ravel", "view",
          axes=views.view, linear="self"),
    entry("view.dtype", "view", axes=views.view_dtype),
    entry("permute", "view", axes=views.permute, linear="self"),
    entry("t transpose swapaxes swapdims mT mH adjoint", "view", axes=views.transpose, linear="self"),
    entry("numpy_T", "view", axes=views.reversed_dims, linear="self"),
    entry("movedim moveaxis", "view", axes=views.movedim, linear="self"),
    entry("squeeze", "view", axes=views.squeeze, linear="self"),
    entry("unsqueeze", "view", axes=views.unsqueeze, linear="self"),
    entry("expand expand_as broadcast_to", "view", axes=views.expand, linear="self"),
    entry("broadcast_tensors", "view", axes=views.broadcast_tensors),
    entry("select", "view", axes=cuts.select, linear="self"),
    entry("slice narrow", "view", axes=cuts.slice_, linear="self"),
    entry("split split_with_sizes chunk unsafe_chunk unsafe_split unsafe_split_with_sizes tensor_split unbind", "view",
          axes=cuts.split, linear="self"),
    entry("unfold", "view", axes=views.unfold, linear="self"),
    entry("diagonal", "view", axes=views.diagonal, linear="self"),
    entry("as_strided", "view", axes=views.unchanged_or_fixed, linear="self"),
    entry("view_as_real", "view", axes=views.real, linear="self"),
    entry("view_as_complex", "view", axes=views.complex_, linear="self"),
    entry("detach alias contiguous", "view", axes=pw.first, linear="self"),
    entry("_conj _neg_view conj resolve_conj resolve_neg", "view", axes=pw.first, linear="self"),

    entry("cat concat concatenate", "copy", axes=cuts.cat, linear="tensors"),
    entry("hstack vstack row_stack dstack", "copy", axes=cuts.stacked, linear="tensors"),
    entry("stack", "copy", axes=cuts.stack, linear="tensors"),
    entry("_to_copy lift_fresh_copy type_as to", "copy", axes=pw.first, linear="self"),
    entry("flip roll", "copy", axes=pw.shifted, linear="self"),
    entry("tril triu", "copy", axes=pw.triangle, linear="self"),
    entry("repeat tile", "copy", axes=views.repeat, linear="self"),
    entry("repeat_interleave.self_int", "copy", axes=views.repeat_interleave, linear="self"),
    entry("unfold_copy", "copy", axes=views.unfold, linear="self"),
    entry("meshgrid", "copy", axes=views.meshgrid),
)
