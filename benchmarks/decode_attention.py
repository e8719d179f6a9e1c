"""Attention of one token in one launch: rotary embedding, static cache, softmax and both products.

    turn(x) = x * cosine + (-x[d/2:], x[:d/2]) * sine
    s_j = scaling * turn(q) k_j^T                                               k_position = turn(k), v_position = v
    m_t = max s_j, l_t = sum exp(s_j - m_t), y_t = sum exp(s_j - m_t) v_j       over the places j of tile t
    y = sum_t exp(m_t - m) y_t / sum_t exp(m_t - m) l_t                         m = max m_t

Each program takes one key-value head, with all query heads that share it, and a tile of places up to the position; that
of the position stores the new key and value. The program of a head that ends last adds the tiles up. Products of
16-bit operands add in float32, as the batched products do that it stands for.

Position, and keys and values of earlier places, were written in steps before, so that they are read before the launches
before this one are complete (`bbb_ao.kernels.dependent_launch`). So a graph must hold no more than one step.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from bbb_ao.kernels.dependent_launch import dependent_launch
from bbb_ao.kernels.packed_linear.counts import lasting_counts

# For a head, and for a program: the fastest of 12 pairs from 4 to 32 and from 1 to 8 on an H200, 4 and 8 within 0.3 %.
TILES, WARPS = 16, 2
SMALLEST_TILE, LARGEST_TILE = 16, 128


@triton.jit
def _turned(x_ptr, cosine, sine, channels, rows, own, SIZE: tl.constexpr):
    """Rows of x with their rotary embedding, in x's dtype: [rows, SIZE]."""
    half: tl.constexpr = SIZE // 2
    x = tl.load(x_ptr + rows[:, None] * SIZE + channels[None, :], mask=own[:, None], other=0.0).to(tl.float32)
    partner = (channels + half) % SIZE
    other = tl.load(x_ptr + rows[:, None] * SIZE + partner[None, :], mask=own[:, None], other=0.0).to(tl.float32)
    other = tl.where((channels < half)[None, :], -other, other)
    return (x * cosine[None, :] + other * sine[None, :]).to(x_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["fresh"])
def decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_stride,
    key_stride,
    value_stride,
    cosine_ptr,
    sine_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    sums_ptr,
    shares_ptr,
    counts_ptr,
    out_ptr,
    length,
    scaling,
    fresh,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """sums: float32 [pairs, TILES, HEADS, SIZE]; shares: float32 [2, pairs, TILES, HEADS], m and l of each tile."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    batch, group = pair // GROUPS, pair % GROUPS
    if PDL:
        if fresh != 0:
            gdc_wait()
        gdc_launch_dependents()
    position = tl.load(position_ptr).to(tl.int32)
    places, channels = tile * TILE + tl.arange(0, TILE), tl.arange(0, SIZE)
    at = (pair * length + places)[:, None] * SIZE + channels[None, :]
    earlier = (places < position)[:, None]
    keys = tl.load(keys_ptr + at, mask=earlier, other=0.0)
    values = tl.load(values_ptr + at, mask=earlier, other=0.0)
    if PDL:
        gdc_wait()
    if tile * TILE <= position:
        cosine = tl.load(cosine_ptr + channels).to(tl.float32)
        sine = tl.load(sine_ptr + channels).to(tl.float32)
        head = tl.arange(0, 16)  # the least rows of a product
        own = head < HEADS
        query = _turned(query_ptr + batch * query_stride, cosine, sine, channels, group * HEADS + head, own, SIZE)
        one = group + tl.zeros([1], tl.int32)
        key = _turned(key_ptr + batch * key_stride, cosine, sine, channels, one, one >= 0, SIZE)
        value = tl.load(value_ptr + batch * value_stride + group * SIZE + channels)
        now = (places == position)[:, None]
        keys, values = tl.where(now, key, keys), tl.where(now, value[None, :], values)
        tl.store(keys_ptr + at, keys, mask=now)
        tl.store(values_ptr + at, values, mask=now)
        scores = tl.dot(query, tl.trans(keys)) * scaling
        scores = tl.where((places <= position)[None, :], scores, float("-inf"))
        largest = tl.max(scores, 1)
        weights = tl.exp(scores - largest[:, None])
        part = pair * TILES + tile
        rows = (part * HEADS + head)[:, None] * SIZE + channels[None, :]
        tl.store(sums_ptr + rows, tl.dot(weights.to(values.dtype), values), mask=own[:, None])
        tl.store(shares_ptr + part * HEADS + head, largest, mask=own)
        after = tl.num_programs(0) * TILES * HEADS
        tl.store(shares_ptr + after + part * HEADS + head, tl.sum(weights, 1), mask=own)
        # All threads have written before one of them counts.
        tl.debug_barrier()
        used = tl.minimum(position // TILE + 1, TILES)
        if tl.atomic_add(counts_ptr + pair, 1) == used - 1:
            _add_tiles(sums_ptr, shares_ptr, out_ptr, pair, used, after, HEADS, SIZE, TILES)
            tl.store(counts_ptr + pair, 0)


@triton.jit
def _add_tiles(
    sums_ptr, shares_ptr, out_ptr, pair, used, after, HEADS: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr
):
    """The sums of a pair's tiles over those of their weights, past the first cache, which is not shared."""
    head, channels, tiles = tl.arange(0, HEADS), tl.arange(0, SIZE), tl.arange(0, TILES)
    parts = (pair * TILES + tiles)[:, None] * HEADS + head[None, :]
    known = (tiles < used)[:, None]
    largest = tl.load(shares_ptr + parts, mask=known, other=float("-inf"), cache_modifier=".cg")
    share = tl.exp(largest - tl.expand_dims(tl.max(largest, 0), 0))
    total = tl.sum(share * tl.load(shares_ptr + after + parts, mask=known, other=0.0, cache_modifier=".cg"), 0)
    at = parts[:, :, None] * SIZE + channels[None, None, :]
    sums = tl.load(sums_ptr + at, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
    y = tl.sum(sums * (share / tl.expand_dims(total, 0))[:, :, None], 0)
    rows = (pair * HEADS + head)[:, None] * SIZE + channels[None, :]
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty))


def _check_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> None:
    """Refuse what `decode_attention` says that it refuses."""
    batch, _, heads, size = query.shape
    groups, length = keys.shape[1:3]
    shared = heads // groups
    expected = {
        "query": (query, (batch, 1, shared * groups, size)),
        "key": (key, (batch, 1, groups, size)),
        "value": (value, (batch, 1, groups, size)),
        "cosine": (cosine, (1, 1, size)),
        "sine": (sine, (1, 1, size)),
        "keys": (keys, (batch, groups, length, size)),
        "values": (values, (batch, groups, length, size)),
        "position": (position, (1,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape} beside the others, got {tuple(tensor.shape)}")
        together = tensor.stride()[2:] == (size, 1) if name in ("query", "key", "value") else tensor.is_contiguous()
        if not together:
            raise ValueError(f"{name}: expected contiguous heads, got strides {tensor.stride()}")
    if shared not in (1, 2, 4, 8, 16) or triton.next_power_of_2(size) != size or length > TILES * LARGEST_TILE:
        raise ValueError(
            f"attention: expected 1, 2, 4, 8 or 16 heads for each of keys, head_dim a power of two and at most "
            f"{TILES * LARGEST_TILE} places, got {shared} heads, head_dim {size} and {length} places"
        )


@torch.library.custom_op("bbb_ao_benchmarks::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
) -> Tensor:
    """softmax(scaling * turn(query) @ keys^T over the places up to `position`) @ values, after it stored key and value.

    Args:
        query: [batch, 1, heads, head_dim], head_dim a power of two; as they come from their projection.
        key, value: [batch, 1, key-value heads, head_dim], for 1, 2, 4, 8 or 16 heads each.
        cosine, sine: [1, 1, head_dim], of the rotary embedding.
        keys, values: contiguous [batch, key-value heads, length, head_dim], length at most 2,048. Written at the place.
        position: int64 [1], the place of the token, below length; it is on the device, so that it is not checked.
    Returns:
        [batch, 1, heads, head_dim].
    Raises:
        ValueError: another shape, heads of a token that lie apart, or a cache that is not contiguous.
    """
    _check_operands(query, key, value, cosine, sine, keys, values, position)
    batch, _, heads, size = query.shape
    groups, length = keys.shape[1:3]
    shared, pairs = heads // groups, batch * groups
    tile = max(SMALLEST_TILE, triton.next_power_of_2(-(-length // TILES)))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = query.new_empty(pairs * TILES * shared * size, dtype=torch.float32)
    shares = query.new_empty(2 * pairs * TILES * shared, dtype=torch.float32)
    options: dict[str, Any] = {"GROUPS": groups, "HEADS": shared, "SIZE": size, "TILE": tile, "TILES": TILES}
    strides = (query.stride(0), key.stride(0), value.stride(0))
    with torch.cuda.device_of(query):
        if query.is_cuda:
            counts = lasting_counts("decode_attention", pairs, query.get_device())
        else:
            counts = query.new_zeros(pairs, dtype=torch.int32)
        operands = (cosine, sine, keys, values, position, sums, shares, counts, out, length, scaling)
        decode_attention_kernel[pairs, TILES](
            query,
            key,
            value,
            *strides,
            *operands,
            **options,
            num_warps=WARPS,
            **dependent_launch(query.device),
        )
    return out


@decode_attention.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
