"""A packed product, the residual sum and RMSNorm behind it, and the packed product behind those, as two operators.

For packed weights V and W, an input x, a residual stream h and a norm with weights g (`packed_linear` has the rest):

    hidden = h + V x                          packed_linear_residual
    weighted[k] = g[k] * hidden[k]
    squares[i] = sum of hidden[k]**2 for 16 i <= k < 16 (i + 1)
    y = r * (W weighted) + bias,   r = 1 / sqrt(sum(squares) / channels + eps)          packed_linear_normed
    or silu(first half of y) * second half of y, where W is a gate and an up projection      the same, gated

Since r is one number for a row, the second product can run on what is not divided by the norm yet. So what a norm does
with each channel is done once, where the channel is made; and a layer whose columns are gathered by an index, with
split channels twice, still has each channel in the norm once.

With u the largest relative error of rounding to x's type (2**-8 in bfloat16, 2**-11 in float16), a channel of a model's
own norm, round(g[k] * round(hidden[k] * r)), is off by up to 2 u + u**2, `weighted` by u (next to 0 by half of the
smallest subnormal number); what `decode` computes from either is not rounded before the sum over channels. float16
overflows where |g[k] * hidden[k]| passes 65,504.
"""

from bbb_ao.kernels.packed_norm.op import packed_linear_normed_op, packed_linear_residual_op

__all__ = ["packed_linear_normed_op", "packed_linear_residual_op"]
