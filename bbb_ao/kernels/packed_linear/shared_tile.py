"""How a tile of `warpgroup` ends: one program writes it, or those that have columns of it add up their parts.

Those whose columns end in the tile, four at most, own pieces of it in turn (the last program of all, where its columns
are fewer, counts as one that goes on). Each program writes the pieces of others as float32; an owner waits until all
have done so, adds up its own, which it kept in registers, and finishes them. A program that waits takes the place of
one it may wait for. So it gives up after some looks, writes its own pieces too, and leaves them to the last that comes.

A tile and its programs are handed on as a team: (the tile, its blocks of 128 columns, its first program, how many
programs, how many of them own pieces). Programs of a team have a rank, from 0 on.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def columns_turned(columns):
    """Of so many columns of sums, those turned round in shared memory at a time.

    With more, stages would no longer fit: beside tiles of 256, and of 64, of which two programs share a multiprocessor.
    """
    return max(16, min(columns, 64 if columns == 128 else 32))


@gluon.jit
def finish(y, result, m0, n0, terms):
    """Scale sums [64, columns], add the bias, round, and write y, turned round in shared memory.

    Args:
        terms: (factor, bias) of the rows, [64, 1] each.
    """
    layout: gl.constexpr = gl.BlockedLayout([8, columns_turned(y.shape[1]) // 16], [8, 4], [1, 4], [0, 1])
    y_ptr, _, M, N, _, _, _ = result
    factor = gl.convert_layout(terms[0], y.type.layout, assert_trivial=True)
    bias = gl.convert_layout(terms[1], y.type.layout, assert_trivial=True)
    y = (y * factor + bias).to(y_ptr.dtype.element_ty)
    n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    m = m0 + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(y_ptr + m.to(gl.int64) * N + n, gl.convert_layout(y, layout), mask=(n < N) & (m < M))


@gluon.jit
def _quarters(acc, flat: gl.constexpr):
    """Sums [64, BM] as pieces of BM / 4 columns (two of 8 where BM is 16), each flat, in the order threads hold it."""
    pieces = (acc,)
    for _ in gl.static_range(2 if acc.shape[1] > 16 else 1):
        halves = ()
        for i in gl.static_range(len(pieces)):
            halves = halves + pieces[i].reshape([64, 2, pieces[i].shape[1] // 2]).permute([0, 2, 1]).split()
        pieces = halves
    rows = ()
    for i in gl.static_range(len(pieces)):
        # n = 16 * warp + 8 * h + r, m = 8 * j + 2 * q + e, to [j, warp, r, q, h, e]: 16 bytes of each thread.
        sixth = pieces[i].reshape([4, 2, 8, pieces[i].shape[1] // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
        rows = rows + (gl.convert_layout(sixth.reshape([64 * pieces[i].shape[1]]), flat, assert_trivial=True),)
    return rows


@gluon.jit
def _part(result, team, rank, SIZE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """Where a program's part of a tile lies, SIZE floats: its slot for the tile that it starts with, or for others."""
    _, parts_ptr, _, _, _, SHARE, _ = result
    tile, NB, first, _, _ = team
    program = first + rank
    slot = 2 * program + (tile * NB > program * SHARE).to(gl.int32)
    return parts_ptr + (slot * GROUPS + GROUP).to(gl.int64) * SIZE


@gluon.jit
def _take_over(pieces, result, team, gave_up, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """The pieces of a tile, with those of the owners in `gave_up`, a mask, read back from what they wrote."""
    PIECE: gl.constexpr = pieces[0].shape[0]
    taken = ()
    for at in gl.static_range(len(pieces)):
        y = pieces[at]
        owner = at % team[4]
        if gave_up >> owner & 1 != 0:
            there = _part(result, team, owner, len(pieces) * PIECE, GROUP, GROUPS) + at * PIECE
            y = gl.load(there + gl.arange(0, PIECE, layout=y.type.layout), cache_modifier=".cg")
        taken = taken + (y,)
    return taken


@gluon.jit
def _add_other(pieces, result, team, mine, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """The pieces of a tile of two programs, those of the owners in `mine` with the other's part added.

    There are no branches, so that all reads are under way at once.
    """
    PIECE: gl.constexpr = pieces[0].shape[0]
    sums = ()
    for at in gl.static_range(len(pieces)):
        owner = at % team[4]
        place = at * PIECE + gl.arange(0, PIECE, layout=pieces[at].type.layout)
        part = _part(result, team, (owner == 0).to(gl.int32), len(pieces) * PIECE, GROUP, GROUPS)
        mask = place * 0 + (mine >> owner & 1) != 0
        sums = sums + (pieces[at] + gl.load(part + place, mask=mask, other=0.0, cache_modifier=".cg"),)
    return sums


@gluon.jit
def _add_others(
    y, result, team, owner, AT: gl.constexpr, SIZE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr
):
    """Piece AT of the owner's part of a tile, and those of its other programs added in their order."""
    programs = team[3]
    place = AT * y.shape[0] + gl.arange(0, y.shape[0], layout=y.type.layout)
    # As many reads under way at once as registers allow.
    threes = (programs - 1) // 3 * 3
    for three in range(0, threes, 3):
        for i in gl.static_range(3):
            other = three + i + (three + i >= owner).to(gl.int32)
            y += gl.load(_part(result, team, other, SIZE, GROUP, GROUPS) + place, cache_modifier=".cg")
    for one in range(threes, programs - 1):
        other = one + (one >= owner).to(gl.int32)
        y += gl.load(_part(result, team, other, SIZE, GROUP, GROUPS) + place, cache_modifier=".cg")
    return y


@gluon.jit
def _add_up(pieces, result, team, mine, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """The pieces of a tile, those of the owners in `mine`, a mask, with the parts of all other programs added."""
    if team[3] == 2:
        sums = _add_other(pieces, result, team, mine, GROUP, GROUPS)
    else:
        SIZE: gl.constexpr = len(pieces) * pieces[0].shape[0]
        sums = ()
        for at in gl.static_range(len(pieces)):
            y = pieces[at]
            owner = at % team[4]
            if mine >> owner & 1 != 0:
                y = _add_others(y, result, team, owner, at, SIZE, GROUP, GROUPS)
            sums = sums + (y,)
    return sums


@gluon.jit
def _all_came(seen, before, programs):
    """Whether a tile's counter shows that all its programs wrote their parts: all arrived, or it was reset since."""
    return (seen & 0xFFF == programs) | (seen >> 16 != before >> 16)


@gluon.jit
def share(
    acc,
    result,
    tile,
    m0,
    n0,
    terms,
    NB,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Finish a tile of sums [64, BM], with the other programs that have columns of it.

    The tile's counter holds arrivals in bits 0 to 11, in 12 to 15 the owners who gave up, and above them how often all
    came; each launch leaves the lower bits at zero.
    """
    _, _, _, _, count_ptr, SHARE, polls = result
    first = tile * NB // SHARE
    programs = (tile * NB + NB - 1) // SHARE - first + 1
    if programs == 1:
        finish(acc, result, m0, n0, terms)
    else:
        flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        pieces = _quarters(acc, flat)
        PIECE: gl.constexpr = pieces[0].shape[0]
        # The last program of a tile may go on with the next.
        owners = programs - ((first + programs) * SHARE > tile * NB + NB).to(gl.int32)
        owners = gl.minimum(owners, len(pieces))
        team = (tile, NB, first, programs, owners)
        rank = gl.program_id(0) - first
        part = _part(result, team, rank, len(pieces) * PIECE, GROUP, GROUPS) + gl.arange(0, PIECE, layout=flat)
        for at in gl.static_range(len(pieces)):
            if at % owners != rank:
                gl.store(part + at * PIECE, pieces[at])
        # All threads have written before one of them counts.
        tl.debug_barrier()
        counter = count_ptr + tile * GROUPS + GROUP
        before = gl.atomic_add(counter, 1, sem="acq_rel")
        seen = before + 1
        gave_up = 0
        if _all_came(seen, before, programs):
            gave_up = before >> 12 & 0xF
            # What stood there on arrival goes; an owner who gives up from now on sees that all came.
            gl.atomic_add(counter, 0x10000 - (before & 0xFFFF) - 1, sem="release")
        elif rank < owners:
            while (polls > 0) & (_all_came(seen, before, programs) == 0):
                seen = gl.atomic_add(counter, 0, sem="acquire")
                polls -= 1
            if _all_came(seen, before, programs) == 0:
                for at in gl.static_range(len(pieces)):
                    if at % owners == rank:
                        gl.store(part + at * PIECE, pieces[at])
                tl.debug_barrier()
                seen = gl.atomic_add(counter, 0x1000 << rank, sem="acq_rel")
                if _all_came(seen, before, programs):
                    # Too late to leave them: the last one does not know. They are finished below.
                    gl.atomic_add(counter, -(0x1000 << rank), sem="relaxed")
        if _all_came(seen, before, programs):
            mine = gl.where(rank < owners, 1 << rank, 0) | gave_up
            sums = _add_up(_take_over(pieces, result, team, gave_up, GROUP, GROUPS), result, team, mine, GROUP, GROUPS)
            COLUMNS: gl.constexpr = PIECE // 64
            for at in gl.static_range(len(pieces)):
                if mine >> at % owners & 1 != 0:
                    y = sums[at].reshape([COLUMNS // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
                    finish(y.reshape([64, COLUMNS]), result, m0 + at * COLUMNS, n0, terms)
