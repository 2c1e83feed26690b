"""Products, and Fourier transforms."""

from graphopt.graph.op_rules import flop_formulas as cost
from graphopt.graph.op_rules import reductions as red
from graphopt.graph.op_rules.axis_rules import contractions as con
from graphopt.graph.op_rules.axis_rules import pointwise as pw
from graphopt.graph.op_rules.op_rule import BETA, entry

# fmt: off
ENTRIES = (
    entry("mm", "contraction", axes="self: mk, mat2: kn -> mn", linear="self | mat2"),
    entry("_scaled_mm", "contraction", axes="self: mk, mat2: kn -> mn"),
    entry("bmm", "contraction", axes="self: bmk, mat2: bkn -> bmn", linear="self | mat2"),
    entry("mv", "contraction", axes="self: mk, vec: k -> m", linear="self | vec"),
    entry("dot", "contraction", axes="self: k, tensor: k -> ", linear="self | tensor"),
    entry("vdot", "contraction", axes="self: k, other: k -> ", linear="self | other"),
    entry("outer ger", "contraction", axes="self: a, vec2: b -> ab", linear="self | vec2"),
    entry("addmm", "contraction", axes="self?: mn, mat1: mk, mat2: kn -> mn",
          linear="self + mat1 | self + mat2", reads=BETA),
    entry("baddbmm", "contraction", axes="self?: bmn, batch1: bmk, batch2: bkn -> bmn",
          linear="self + batch1 | self + batch2", reads=BETA),
    entry("addbmm", "contraction", axes="self?: mn, batch1: bmk, batch2: bkn -> mn",
          linear="self + batch1 | self + batch2", reads=BETA),
    entry("addmv", "contraction", axes="self?: m, mat: mk, vec: k -> m",
          linear="self + mat | self + vec", reads=BETA),
    entry("matmul linalg_matmul", "contraction", axes=con.MATMUL, linear="self | other"),
    entry("matmul_backward", "contraction", axes=con.matmul_backward, flops=cost.matmul_backward, linear="grad"),
    entry("linear", "contraction", axes="input: *k, weight: nk, bias?: n -> *n | input: *k, weight: k, bias?: -> *",
          linear="input + bias | weight + bias"),
    entry("linear_backward mkldnn_linear_backward", "contraction",
          axes="self: *k, grad_output: *n, weight: nk -> *k; nk; n", flops=cost.linear_backward, linear="grad_output"),
    entry("bilinear", "contraction", axes="input1: *a, input2: *b, weight: oab, bias?: o -> *o"),
    entry("_trilinear", "contraction", axes=con.trilinear, flops=cost.trilinear, linear="i1 | i2 | i3"),
    entry("einsum", "contraction", axes=con.einsum, flops=cost.einsum, reduces=red.einsum),
    entry("cdist", "contraction", axes=con.distances),
    entry("_grouped_mm", "contraction", axes=con.grouped_mm, flops=cost.grouped(1)),
    entry("transformers::grouped_mm_fallback", "contraction", axes=con.grouped_mm, flops=cost.grouped(1)),
    entry("transformers::grouped_mm_fallback_backward", "contraction", axes=con.grouped_mm_backward,
          flops=cost.grouped(2), linear="grad_output"),
    entry("_fft_r2c _fft_c2r _fft_c2c fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 "
          "fft_fftn fft_ifftn fft_rfftn fft_irfftn", "transform", axes=pw.transformed, linear="self"),
    entry("stft", "transform", axes=pw.spectrogram, linear="self"),
)
