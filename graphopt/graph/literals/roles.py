"""What the integers among an operator's arguments mean: one line an argument.

Names of arguments mean the same thing in most operators, so the table goes by name, with exceptions by operator. An
integer argument that is in neither is of no known role: a graph in which it might have to change is not changed.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import fx


class Role(StrEnum):
    """What an integer says."""

    RESULT = "size of the result"
    RESULT_LAST = "size of the result, aligned at its last dimension"
    OPERAND_LAST = "size of the operand, aligned at its last dimension"
    TOLD = "a size that the operator could see from its operands"
    COPIES = "how many copies"
    GROUPS = "outer factor of the channels"
    PIECE = "size of each piece"
    PIECES = "sizes of the pieces"
    LENGTH = "size of the result along the dimension worked on"
    POSITION = "place in the dimension worked on"
    STEP = "inner factor of the dimension worked on"
    EDGE = "elements added at an edge"
    WINDOW = "size of windows of the dimension worked on"
    VALUE = "a number that is computed with"
    CONSTANT = "no size"
    UNKNOWN = "unknown"


R = Role

_BY_NAME: dict[str, Role] = {
    # sizes
    "size": R.RESULT,
    "input_size": R.RESULT,  # of `upsample_*_backward`, which makes a gradient of that size
    "input_sizes": R.RESULT,  # of `slice_backward`, `select_backward`
    "output_size": R.RESULT_LAST,
    "normalized_shape": R.OPERAND_LAST,
    "repeats": R.COPIES,
    "split_size": R.PIECE,
    "split_sizes": R.PIECES,
    "groups": R.GROUPS,
    "group": R.GROUPS,
    "num_groups": R.GROUPS,
    "length": R.LENGTH,
    "pad": R.EDGE,
    # places
    "start": R.POSITION,
    "end": R.POSITION,
    "index": R.POSITION,
    "step": R.STEP,
    # which dimension, and how windows lie: no axis can be left out of them
    **dict.fromkeys(
        """
        dim dims dim0 dim1 dim2 axis axis0 axis1 source destination dimension start_dim end_dim
        kernel_size kernel stride padding output_padding dilation upscale_factor downscale_factor block_size
        """.split(),  # noqa: SIM905
        R.CONSTANT,
    ),
    # modes, and counts of what is no dimension
    **dict.fromkeys(
        """
        reduction mode ignore_index padding_idx num_layers chunks sections interpolation_mode correction ord p
        shifts offset diagonal seed edge_order n padding_mode divisor_override num_samples decimals normalization
        last_dim_size expand1 expand2 expand3 sumdim unroll_dim minlength path blank input_lengths target_lengths steps
        window_length row col compute_mode
        """.split(),  # noqa: SIM905
        R.CONSTANT,
    ),
}

_BY_OPERATOR: dict[str, Role] = {
    # the dimension that positions, windows or values lie along is frozen by the axis rule
    "arange.end": R.CONSTANT,
    "arange.start": R.CONSTANT,
    "arange.step": R.CONSTANT,
    "linspace.start": R.CONSTANT,
    "linspace.end": R.CONSTANT,
    "linspace.steps": R.CONSTANT,
    "eye.n": R.CONSTANT,
    "eye.m": R.CONSTANT,
    "topk.k": R.CONSTANT,
    "kthvalue.k": R.CONSTANT,
    "one_hot.num_classes": R.CONSTANT,
    "histc.bins": R.CONSTANT,
    "randint.low": R.VALUE,
    "randint.high": R.VALUE,
    "randint_like.low": R.VALUE,
    "randint_like.high": R.VALUE,
    "randperm.n": R.CONSTANT,
    "embedding_dense_backward.num_weights": R.CONSTANT,
    "stft.n_fft": R.CONSTANT,
    "stft.hop_length": R.CONSTANT,
    "stft.win_length": R.CONSTANT,
    "col2im.output_size": R.RESULT_LAST,
    # arguments whose name means something else elsewhere
    "unfold.size": R.WINDOW,
    "unfold.step": R.WINDOW,
    "tile.dims": R.COPIES,
    "reshape.shape": R.RESULT,
    "unflatten.sizes": R.TOLD,
    "repeat_interleave.output_size": R.LENGTH,
    "as_strided.size": R.UNKNOWN,
    "as_strided.stride": R.UNKNOWN,
    "new_empty_strided.stride": R.UNKNOWN,
    "empty_strided.stride": R.UNKNOWN,
    # sizes that a kernel is told beside its operand
    "native_group_norm.N": R.TOLD,
    "native_group_norm.C": R.TOLD,
    "native_group_norm.HxW": R.TOLD,
    "native_group_norm_backward.N": R.TOLD,
    "native_group_norm_backward.C": R.TOLD,
    "native_group_norm_backward.HxW": R.TOLD,
    "mkldnn_rnn_layer.hidden_size": R.TOLD,
    "mkldnn_rnn_layer_backward.hidden_size": R.TOLD,
    "convolution_backward.bias_sizes": R.TOLD,
    **{f"upsample_{kind}_backward.output_size": R.OPERAND_LAST for kind in (
        "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d",
    )},
}  # fmt: skip

_NEVER_SIZES = {"exponent", "eps", "momentum", "dropout", "alpha", "beta"}
"""Numbers that are computed with, but that no size could be meant by."""


def role_of(node: fx.Node, argument: str, is_number: bool) -> Role:
    """The role of an integer in this argument; ``is_number``: the schema takes any number or a tensor there."""
    name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
    found = _BY_OPERATOR.get(f"{name}.{argument}")
    if found is not None:
        return found
    if is_number:
        return R.CONSTANT if argument in _NEVER_SIZES else R.VALUE
    return _BY_NAME.get(argument, R.UNKNOWN)
