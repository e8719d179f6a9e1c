"""What the Gluon kernels share: words of codes from words of the planes, and a block's scales and zero offsets."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bbb_ao.kernels.packed_linear import ptx


@gluon.jit
def _merge(a, b, MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    merge: gl.constexpr = ptx.merge(MASK, LEFT, RIGHT)
    return gl.inline_asm_elementwise(merge, "=r,r,r", [a, b], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def assemble(high, mid, low_even, low_odd, R: gl.constexpr):
    """16-bit words of R-bit codes from words of the planes that hold them, as `packing.words` does it: R / 2 sets."""
    if R == 2:
        words = (high,)
    else:
        even = _merge(high, mid, 0x33333333, 2, 0)
        odd = _merge(high, mid, 0xCCCCCCCC, 0, 2)
        if R == 4:
            words = (even, odd)
        else:
            words = (
                _merge(even, low_even, 0x0F0F0F0F, 4, 0),
                _merge(odd, low_odd, 0x0F0F0F0F, 4, 0),
                _merge(even, low_even, 0xF0F0F0F0, 0, 4),
                _merge(odd, low_odd, 0xF0F0F0F0, 0, 4),
            )
    return words


@gluon.jit
def load_scales(scale_ptr, zero_ptr, row, block, last, NB, ZB: gl.constexpr):
    """Packed scales and zero offsets of a block's four groups, int32 of row's and block's shape; 0 from `last` on."""
    mask = block + row * 0 < last
    place = row * NB + block
    scale = gl.load(scale_ptr.to(gl.pointer_type(gl.int32)) + place, mask=mask, other=0)
    if ZB == 8:
        zero = gl.load(zero_ptr.to(gl.pointer_type(gl.int32)) + place, mask=mask, other=0)
    elif ZB == 4:
        zero = gl.load(zero_ptr.to(gl.pointer_type(gl.int16)) + place, mask=mask, other=0).to(gl.int32)
    elif ZB == 2:
        zero = gl.load(zero_ptr + place, mask=mask, other=0).to(gl.int32)
    else:
        zero = scale
    return scale, zero
