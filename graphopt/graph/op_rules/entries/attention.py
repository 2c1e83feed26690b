"""Attention and recurrent layers. Attention draws only with dropout; its backward reads the seed that forward saved."""

from graphopt.graph.op_rules import flop_formulas as cost
from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import attention as att
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import DROPOUT, entry, never

# fmt: off
ENTRIES = (
    entry("scaled_dot_product_attention", "attention", axes=att.attention, flops=cost.attention,
          reduces=red.attention, draws=DROPOUT),
    entry("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
          "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu "
          "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math",
          "attention", axes=att.attention, flops=cost.attention, reduces=red.attention, draws=DROPOUT),
    entry("_flash_attention_forward _efficient_attention_forward", "attention", axes=att.attention_rows_first,
          flops=cost.attention, draws=DROPOUT),
    entry("_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention_backward "
          "_scaled_dot_product_flash_attention_for_cpu_backward "
          "_scaled_dot_product_fused_attention_overrideable_backward", "attention", axes=att.attention_backward,
          flops=cost.attention_backward, reduces=red.attention_backward, linear="grad_out", draws=never),
    entry("_scaled_dot_product_efficient_attention_backward", "attention", axes=att.attention_backward,
          flops=cost.attention_backward, reduces=red.attention_backward, linear="grad_out_", draws=never),
    entry("_flash_attention_backward", "attention", axes=att.attention_rows_first_backward,
          flops=cost.attention_backward, linear="grad_out", draws=never),
    entry("_efficient_attention_backward", "attention", axes=att.attention_rows_first_backward,
          flops=cost.attention_backward, linear="grad_out_", draws=never),
    entry("torch_attn::_varlen_attn", "attention", flops=cost.attention),
    entry("torch_attn::_varlen_attn_backward", "attention", flops=cost.attention_backward, linear="grad_out"),
    entry("_fused_sdp_choice", "number", axes=pw.number, draws=never),

    entry("lstm gru rnn_tanh rnn_relu", "recurrent", axes=att.recurrent, flops=cost.recurrent(1, "params"),
          draws=lambda a: a.train and a.dropout != 0),
    entry("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", "recurrent", axes=att.recurrent_cell,
          flops=cost.recurrent(1, "w_ih", "w_hh")),
    entry("mkldnn_rnn_layer", "recurrent", axes=att.recurrent_layer, flops=cost.recurrent(1, "weight0", "weight1"),
          reduces=red.recurrent_layer),
    entry("mkldnn_rnn_layer_backward", "recurrent", axes=att.recurrent_layer_backward,
          flops=cost.recurrent(2, "weight1", "weight2"), reduces=red.recurrent_layer_backward,
          linear="grad_output + grad_hy + grad_cy"),
    entry("_cudnn_rnn", "recurrent", flops=cost.recurrent(1, "weight"), draws=lambda a: a.train and a.dropout != 0),
    entry("_cudnn_rnn_backward", "recurrent", flops=cost.recurrent(2, "weight"),
          linear="grad_output + grad_hy + grad_cy"),
    entry("_thnn_fused_lstm_cell _thnn_fused_gru_cell", "recurrent"),
    entry("_thnn_fused_lstm_cell_backward _thnn_fused_lstm_cell_backward_impl", "recurrent",
          linear="grad_hy + grad_cy"),
    entry("_thnn_fused_gru_cell_backward", "recurrent", linear="grad_hy"),
)
