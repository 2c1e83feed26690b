"""Normalisations."""

from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import normalisation as norm
from graphopt.graph.op_rules.op_rule import MASK_0, MASK_0_OR_1, channels_last_on_cpu, entry, never

# fmt: off
ENTRIES = (
    entry("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
          "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional "
          "_batch_norm_no_update cudnn_batch_norm miopen_batch_norm batch_norm",
          "normalisation", axes=norm.batch_norm, reduces=red.batch_norm),
    entry("native_layer_norm layer_norm", "normalisation", axes=norm.layer_norm,
          reduces=red.layer_norm("mean", "variance")),
    entry("_fused_rms_norm rms_norm", "normalisation", axes=norm.layer_norm, reduces=red.layer_norm("norm")),
    entry("native_group_norm group_norm", "normalisation", axes=norm.group_norm, reduces=red.group_norm),
    entry("instance_norm", "normalisation", axes=norm.instance_norm, reduces=red.instance_norm),
    # x' = (x - mean) invstd; dw = sum dy x'; db = sum dy
    # dx = w invstd (dy - avg(dy) - x' avg(dy x')) in training, with the batch's statistics
    # dx = w invstd dy                              in evaluation, with the running statistics
    entry("native_batch_norm_backward", "normalisation", axes=norm.batch_norm_backward,
          reduces=red.batch_norm_backward, linear="grad_out", reads={
              "input": lambda a: a.output_mask[1] or (a.train and a.output_mask[0]),
              "weight": MASK_0,
              "running_mean": lambda a: not a.train and a.output_mask[1],
              "running_var": lambda a: not a.train and (a.output_mask[0] or a.output_mask[1]),
              "save_mean": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
              "save_invstd": lambda a: a.train and (a.output_mask[0] or a.output_mask[1]),
          }),
    # the same, but in training (`update`) CUDA may choose cuDNN, which makes all three gradients whatever the mask
    entry("batch_norm_backward", "normalisation", axes=norm.batch_norm_backward,
          reduces=red.batch_norm_backward, linear="grad_out", reads={
              "input": lambda a: a.output_mask[1] or a.update,
              "weight": lambda a: a.output_mask[0] or a.update,
              "running_mean": lambda a: not a.update and a.output_mask[1],
              "running_var": lambda a: not a.update and (a.output_mask[0] or a.output_mask[1]),
              "save_mean": lambda a: a.update,
              "save_var": lambda a: a.update,
              "reserve": lambda a: a.update,
          }),
    entry("cudnn_batch_norm_backward miopen_batch_norm_backward", "normalisation", linear="grad_output"),
    entry("native_layer_norm_backward", "normalisation", axes=norm.layer_norm_backward,
          reduces=red.layer_norm_backward, linear="grad_out", reads={
              "input": MASK_0_OR_1, "mean": MASK_0_OR_1, "rstd": MASK_0_OR_1, "weight": MASK_0, "bias": never,
          }),
    # the CPU kernel for channels-last memory crashes without an input gradient (torch 2.13: GroupNormBackwardNHWC)
    entry("native_group_norm_backward", "normalisation", axes=norm.group_norm_backward,
          reduces=red.group_norm_backward, linear="grad_out", reads={
              "input": MASK_0_OR_1, "mean": MASK_0_OR_1, "rstd": MASK_0_OR_1, "weight": MASK_0,
          }, stays={0: channels_last_on_cpu}),
    entry("_fused_rms_norm_backward", "normalisation", axes=norm.layer_norm_backward,
          reduces=red.layer_norm_backward, linear="grad_out"),
    entry("_weight_norm_interface", "normalisation", axes=norm.weight_norm, reduces=red.weight_norm, linear="g"),
    entry("_weight_norm_interface_backward", "normalisation", axes=norm.weight_norm_backward, linear="grad_w"),
    entry("_weight_norm", "normalisation", axes=norm.weight_norm, reduces=red.weight_norm),
)
