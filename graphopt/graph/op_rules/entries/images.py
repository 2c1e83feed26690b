"""Convolution, pooling, resampling, padding. In backward, `self` lends its shape and format only."""

from graphopt.graph.op_rules import flop_formulas as cost
from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import cuts, views
from graphopt.graph.op_rules.axis_rules import images as img
from graphopt.graph.op_rules.op_rule import MASK_0, MASK_1, SHAPE_ONLY, entry

# fmt: off
ENTRIES = (
    entry("convolution _convolution convolution_overrideable", "convolution", axes=img.convolution,
          flops=cost.convolution("input"), reduces=red.convolution, linear="input + bias | weight + bias"),
    entry("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", "convolution",
          axes=img.convolution, flops=cost.convolution("input"), reduces=red.convolution,
          linear="input + bias | weight + bias"),
    entry("cudnn_convolution", "convolution", axes=img.convolution, flops=cost.convolution("self"),
          reduces=red.convolution, linear="self | weight"),
    entry("_slow_conv2d_forward", "convolution", axes=img.convolution, flops=cost.convolution("self"),
          reduces=red.convolution, linear="self + bias | weight + bias"),
    # the input gradient needs the weight, the weight gradient the input
    entry("convolution_backward", "convolution", axes=img.convolution_backward, flops=cost.convolution_backward,
          reduces=red.convolution_backward, linear="grad_output", reads={"input": MASK_1, "weight": MASK_0}),

    entry("max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
          "fractional_max_pool2d fractional_max_pool3d", "pooling", axes=img.windows),
    entry("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", "pooling", axes=img.windows,
          reduces=red.global_pooling("max")),
    entry("max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward "
          "adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward",
          "pooling", axes=img.windows_backward, linear="grad_output", reads=SHAPE_ONLY),
    entry("avg_pool1d avg_pool2d avg_pool3d", "pooling", axes=img.windows, linear="self"),
    entry("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
          "pooling", axes=img.windows, reduces=red.global_pooling("mean"), linear="self"),
    entry("avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward",
          "pooling", axes=img.windows_backward, linear="grad_output", reads=SHAPE_ONLY),
    entry("max_unpool2d max_unpool3d", "scatter", axes=img.unpool, reduces=red.nothing, linear="self"),

    entry("upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
          "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
          "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
          "resampling", axes=img.windows, linear="self"),
    entry("upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d.vec "
          "upsample_bilinear2d.vec upsample_trilinear3d.vec upsample_bicubic2d.vec", "resampling", axes=img.windows),
    entry("upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
          "_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward "
          "_upsample_nearest_exact3d_backward upsample_linear1d_backward upsample_bilinear2d_backward "
          "upsample_trilinear3d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward "
          "_upsample_bicubic2d_aa_backward", "resampling", axes=img.windows_backward, linear="grad_output"),
    entry("grid_sampler grid_sampler_2d grid_sampler_3d", "resampling", axes=img.grid_sample, linear="input"),
    entry("grid_sampler_2d_backward grid_sampler_3d_backward", "resampling", axes=img.grid_sample_backward,
          linear="grad_output", reads={"input": MASK_1}),

    entry("pad", "padding", axes=cuts.pad),
    entry("constant_pad_nd", "padding", axes=cuts.pad, linear="self + value"),
    entry("reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
          "padding", axes=img.windows, linear="self"),
    entry("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
          "replication_pad2d_backward replication_pad3d_backward",
          "padding", axes=img.windows_backward, linear="grad_output", reads=SHAPE_ONLY),
    entry("im2col", "copy", axes=views.im2col, linear="self"),
    entry("col2im", "copy", axes=views.col2im, linear="self"),
    entry("pixel_shuffle", "copy", axes=views.pixel_shuffle, linear="self"),
    entry("pixel_unshuffle", "copy", axes=views.pixel_unshuffle, linear="self"),
    entry("channel_shuffle native_channel_shuffle", "copy", axes=views.channel_shuffle, linear="self"),
)
