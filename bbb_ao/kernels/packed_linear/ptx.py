"""PTX of the Gluon kernels: codes and scales as pairs of 16-bit floats in 32-bit words.

A code masked in place is a 16-bit float whose exponent field is 0 or 1, where floats are equally spaced:
code * 2**place times the smallest subnormal, 2**-133 in bfloat16 and 2**-24 in float16. An E4M3 pattern moved to the
top of the mantissa is e4m3 * 2**-120 in bfloat16 and e4m3 * 2**-8 in float16, its own subnormals included.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MINUS_ZEROS = 0x80008000  # a * b + (-0) is a * b; before compute capability 9.0 bfloat16 has no product of its own


@gluon.constexpr_function
def place(quarter, R):
    """Bit of a byte at which the R-bit codes of a quarter of a block lie."""
    return R * (quarter // (R // 2))


@gluon.constexpr_function
def splat(value, dtype):
    """A number of the type, twice in a 32-bit word."""
    from struct import pack, unpack  # Triton refuses it among a kernel's globals.

    if dtype == gl.bfloat16:
        bits, cut = divmod(unpack("<I", pack("<f", value))[0], 2**16)
    else:
        bits, cut = unpack("<H", pack("<e", value))[0], unpack("<e", pack("<e", value))[0] - value
    assert cut == 0, f"value: expected a number of {dtype}, got {value}"
    return bits * 0x00010001


@gluon.constexpr_function
def fma(dtype):
    """The multiply-add of pairs."""
    return "fma.rn.bf16x2" if dtype == gl.bfloat16 else "fma.rn.f16x2"


@gluon.constexpr_function
def product(dtype):
    """$0 = $1 * $2."""
    return f"{{ .reg .b32 z; mov.b32 z, {MINUS_ZEROS}; {fma(dtype)} $0, $1, $2, z; }}"


@gluon.constexpr_function
def masked(hb, bit, mask):
    """$0 = the codes at `bit` of the low (hb = 0) or high bytes of the two 16-bit words of $1, left where they are."""
    pair = (mask << bit) * 0x00010001
    source = "t" if hb else "$1"
    return f"{{ .reg .b32 t; {'shr.b32 t, $1, 8; ' if hb else ''}and.b32 $0, {source}, {pair}; }}"


@gluon.constexpr_function
def merge(mask, left, right):
    """$0 = ($1 & mask) << left, and ($2 >> right) in the other bits."""
    rest = ~(mask << left) & 0xFFFFFFFF
    first = f"and.b32 t, $1, {mask}; shl.b32 t, t, {left};"
    return f"{{ .reg .b32 t, u; {first} shr.b32 u, $2, {right}; and.b32 u, u, {rest}; or.b32 $0, t, u; }}"


@gluon.constexpr_function
def decode_pair(half):
    """($0, $1) = the two E4M3 numbers in one half of $2, as float32."""
    take = f"shr.b32 s, $2, {16 * half}; cvt.u16.u32 a, s; cvt.rn.f16x2.e4m3x2 p, a;"
    return f"{{ .reg .b16 a, c, d; .reg .b32 s, p; {take} mov.b32 {{c, d}}, p; cvt.f32.f16 $0, c; cvt.f32.f16 $1, d; }}"


@gluon.constexpr_function
def adds_half(dtype, R):
    """Whether zeta * 2**(R-2) - H, and codes less that, are numbers of the type: 8-bit codes need a bit too much."""
    return dtype != gl.bfloat16 or R < 8


@gluon.constexpr_function
def scale_pair(dtype, quarter):
    """$0 = e4m3 * 2**6 in bfloat16, e4m3 * 2**5 in float16; $1 holds four scales."""
    bf16 = dtype == gl.bfloat16
    move, up = (0x00100010, splat(2.0**126, dtype)) if bf16 else (0x00800080, splat(2.0**13, dtype))
    take = f"bfe.u32 t, $1, {8 * quarter}, 8; mul.lo.u32 t, t, {move};"
    return f"{{ .reg .b32 t, c, z; mov.b32 z, {MINUS_ZEROS}; {take} mov.b32 c, {up}; {fma(dtype)} $0, t, c, z; }}"


@gluon.constexpr_function
def half_pair(dtype, R, H):
    """$0 = e4m3 * H (bfloat16) or e4m3 * H / 16 (float16) from $1 of `scale_pair`; 0 where `adds_half`."""
    if adds_half(dtype, R):
        return f"{{ .reg .b32 t; mov.b32 t, $1; mov.b32 $0, {MINUS_ZEROS}; }}"
    factor = splat(H * (2.0**-6 if dtype == gl.bfloat16 else 2.0**-9), dtype)
    return f"{{ .reg .b32 c, z; mov.b32 z, {MINUS_ZEROS}; mov.b32 c, {factor}; {fma(dtype)} $0, $1, c, z; }}"


@gluon.constexpr_function
def zero_pair(dtype, quarter, R, ZB, H):
    """$0 = (H - zeta * 2**(R-2)) * 2**-6 (bfloat16) or * 2**-9 (float16), H = 0 unless `adds_half`; $1 four offsets."""
    bf16 = dtype == gl.bfloat16
    unit = 2.0**-6 if bf16 else 2.0**-9
    half = H if adds_half(dtype, R) else 0.0
    if ZB == 0:
        constant = splat((half - 2.0 ** (R - 1)) * unit, dtype)
        return f"{{ .reg .b32 t; mov.b32 t, $1; mov.b32 $0, {constant}; }}"
    byte, bit = divmod(ZB * quarter, 8)
    # Moved up as far as the code's bits allow, so that the factor stays below the largest float.
    shift = max(0, R - ZB - bit)
    factor = splat(-(2.0 ** ((127 if bf16 else 15) + R - ZB - bit - shift)), dtype)
    take = f"prmt.b32 t, $1, 0, {0x4040 + byte * 0x0101};"
    if ZB < 8:
        take += f" and.b32 t, t, {((2**ZB - 1) << bit) * 0x00010001};"
    if shift:
        take += f" shl.b32 t, t, {shift};"
    add = f"mov.b32 z, {splat(half * unit, dtype) or MINUS_ZEROS};"
    return f"{{ .reg .b32 t, c, z; {add} {take} mov.b32 c, {factor}; {fma(dtype)} $0, t, c, z; }}"


@gluon.constexpr_function
def weight_pair(dtype, hb, bit, mask):
    """$0 = (code * 2**p + zero) * scale + half with p of `zero_pair`; $1 words, $2 scale, $4 half, $6 zero."""
    pair = (mask << bit) * 0x00010001
    codes = f"shr.b32 t, $1, 8; and.b32 t, t, {pair};" if hb else f"and.b32 t, $1, {pair};"
    up = splat(2.0 ** ((127 if dtype == gl.bfloat16 else 15) - bit), dtype)
    exact = f"mov.b32 c, {up}; {fma(dtype)} t, t, c, $6;"
    return f"{{ .reg .b32 t, c; {codes} {exact} {fma(dtype)} $0, t, $2, $4; }}"
