# SPDX-License-Identifier: Apache-2.0
"""One persistent kernel for the masked denoising loop; it reads the plan on the device.

Programs share the columns of every matrix product and wait for each other at grid barriers, so
all of them must be resident at once. Each keeps to the same columns of the action tokens: a reused
block is an addition that needs no barrier, a fully reused step has two. Under TRITON_INTERPRET=1
programs run one after another, so the grid must be (1,) there, and the barriers are left out.

Rows of tokens are padded to ROWS, columns of actions to ACTIONS and memory tokens to MEMORY, each
a power of two of at least 16 (what a matrix product takes); the padding of weights is zero. Width
and heads must be powers of two, and a head at least 16 wide.
"""

import triton
import triton.language as tl

# One argument a line would bury the kernels.
# fmt: off


@triton.jit
def _barrier(arrived, epoch, PROGRAMS: tl.constexpr):
    """Wait until every program has come here for the (epoch + 1)-th time; returns epoch + 1."""
    tl.debug_barrier()
    epoch += 1
    if PROGRAMS > 1:
        tl.atomic_add(arrived, 1, sem='acq_rel', scope='gpu')
        seen = tl.atomic_add(arrived, 0, sem='acq_rel', scope='gpu')
        while seen < epoch * PROGRAMS:
            seen = tl.atomic_add(arrived, 0, sem='acq_rel', scope='gpu')
        tl.debug_barrier()
    return epoch


@triton.jit
def _block(pointer, rows, columns, stride):
    """Pointers to rows x columns of a matrix."""
    return pointer + rows[:, None] * stride + columns[None, :]


@triton.jit
def _normed(tokens, norms, eps, ROWS: tl.constexpr, D: tl.constexpr):
    """Layer normalisation of all tokens; norms is weight [D], then bias [D]."""
    columns = tl.arange(0, D)
    x = tl.load(_block(tokens, tl.arange(0, ROWS), columns, D))
    x -= (tl.sum(x, 1) / D)[:, None]
    x *= tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return x * tl.load(norms + columns)[None, :] + tl.load(norms + D + columns)[None, :]


@triton.jit
def _product(a, weight, bias, columns, K: tl.constexpr, N: tl.constexpr):
    """Columns of a [ROWS, K] @ weight [K, N] + bias [N]."""
    w = tl.load(_block(weight, tl.arange(0, K), columns, N))
    y = tl.dot(a.to(w.dtype), w, input_precision='ieee')
    return y + tl.load(bias + columns)[None, :].to(tl.float32)


@triton.jit
def _project(
    tokens, norms, eps, weight, bias, out, pid, GELU: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """out [ROWS, N] = norm(tokens) @ weight + bias, with GELU if asked for."""
    normed = _normed(tokens, norms, eps, ROWS, D)
    for tile in range(pid, N // TILE, PROGRAMS):
        columns = tile * TILE + tl.arange(0, TILE)
        y = _product(normed, weight, bias, columns, D, N)
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        tl.store(_block(out, tl.arange(0, ROWS), columns, N), y)


@triton.jit
def _residual(
    source, weight, bias, tokens, cell, pid, K: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """y = source [ROWS, K] @ weight [K, D] + bias; stored to the cell and added to the tokens."""
    rows = tl.arange(0, ROWS)
    for tile in range(pid, D // TILE, PROGRAMS):
        columns = tile * TILE + tl.arange(0, TILE)
        y = tl.zeros((ROWS, TILE), tl.float32) + tl.load(bias + columns)[None, :].to(tl.float32)
        for part in range(K // D):
            inner = part * D + tl.arange(0, D)
            w = tl.load(_block(weight, inner, columns, D))
            a = tl.load(_block(source, rows, inner, K))
            y += tl.dot(a.to(w.dtype), w, input_precision='ieee')
        tl.store(_block(cell, rows, columns, D), y, mask=(rows < T)[:, None])
        here = _block(tokens, rows, columns, D)
        tl.store(here, tl.load(here) + y)


@triton.jit
def _attend(
    q, k, v, mask, out, pid, q_stride, kv_stride, n, scale, KEYS: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """out [ROWS, D] = attention to n keys; mask [ROWS, KEYS] is added to the scores."""
    HEAD: tl.constexpr = D // HEADS
    rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
    added = tl.load(_block(mask, rows, keys, KEYS))
    for head in range(pid, HEADS, PROGRAMS):
        columns = head * HEAD + tl.arange(0, HEAD)
        there = (keys < n)[:, None]
        queries = tl.load(_block(q, rows, columns, q_stride))
        values = tl.load(_block(v, keys, columns, kv_stride), mask=there, other=0.0)
        key = tl.load(_block(k, keys, columns, kv_stride), mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(key), input_precision='ieee') * scale + added
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights /= tl.sum(weights, 1)[:, None]
        y = tl.dot(weights, values, input_precision='ieee')
        tl.store(_block(out, rows, columns, D), y)


@triton.jit
def _scheduled(
    x, tokens, norms, w_head, b_head, coefficients, noise, eps, clip, T: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, ACTIONS: tl.constexpr, NOISY: tl.constexpr,
):
    """Head and scheduler of a step: x [ROWS, ACTIONS] becomes less noisy."""
    rows, actions = tl.arange(0, ROWS), tl.arange(0, ACTIONS)
    predicted = _product(_normed(tokens, norms, eps, ROWS, D), w_head, b_head, actions, D, ACTIONS)
    x0 = tl.load(coefficients) * x + tl.load(coefficients + 1) * predicted
    x0 = tl.minimum(tl.maximum(x0, -clip), clip)
    y = tl.load(coefficients + 2) * x0 + tl.load(coefficients + 3) * x
    y += tl.load(coefficients + 4) * predicted
    if NOISY:
        added = _block(noise, rows, actions, ACTIONS)
        y += tl.load(coefficients + 5) * tl.load(added, mask=(rows < T)[:, None], other=0.0)
    return y


@triton.jit(do_not_specialize=('first', 'last'))
def denoise(
    x_state, tokens, wide, mixed, arrived, store, sources, noise, coefficients, memory,
    self_mask, memory_mask, constant, norms, w_action, w_qkv, b_qkv, w_self, b_self, w_q, b_q,
    w_cross, b_cross, w_up, b_up, w_down, b_down, w_head, b_head, first, last, eps, scale, clip,
    T: tl.constexpr, S: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, ACTIONS: tl.constexpr, MEMORY: tl.constexpr,
    NOISY: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """Steps first to last - 1 of the masked loop, x_state [ROWS, ACTIONS] in and out.

    sources: int64 [K, N], the cell whose feature a block reuses, -1 where it is computed; store:
    [K * N, T, D]; noise [K, T, ACTIONS]; memory [K, S, L, 2, D], keys and values; constant
    [ROWS, D], what the embedding adds; tokens and mixed [ROWS, D] and wide [ROWS, 4 D] are
    scratch; arrived is zero. Weights are [L, in, out], biases [L, out], norms [N + 1, 2, D],
    coefficients [K, 6] as in `NoiseScheduler`; masks are added to scores.
    """
    N: tl.constexpr = 3 * LAYERS
    pid = tl.program_id(0)
    rows, actions = tl.arange(0, ROWS), tl.arange(0, ACTIONS)
    there = (rows < T)[:, None]
    x = tl.load(_block(x_state, rows, actions, ACTIONS))
    epoch = 0
    for step in range(first, last):
        for tile in range(pid, D // TILE, PROGRAMS):
            columns = tile * TILE + tl.arange(0, TILE)
            w = tl.load(_block(w_action, actions, columns, D))
            y = tl.load(_block(constant, rows, columns, D))
            y += tl.dot(x.to(w.dtype), w, input_precision='ieee')
            tl.store(_block(tokens, rows, columns, D), y)
        for block in range(N):
            source = tl.load(sources + step * N + block)
            if source >= 0:
                # What the threads of this program wrote before, other threads of it read now.
                tl.debug_barrier()
                for tile in range(pid, D // TILE, PROGRAMS):
                    columns = tile * TILE + tl.arange(0, TILE)
                    feature = _block(store + source * (T * D), rows, columns, D)
                    here = _block(tokens, rows, columns, D)
                    tl.store(here, tl.load(here) + tl.load(feature, mask=there, other=0.0))
            else:
                layer = block // 3
                kind = block % 3
                cell = store + (step * N + block) * (T * D)
                norm = norms + block * 2 * D
                epoch = _barrier(arrived, epoch, PROGRAMS)
                if kind == 0:
                    _project(
                        tokens, norm, eps, w_qkv + layer * 3 * D * D, b_qkv + layer * 3 * D, wide,
                        pid, False, 3 * D, ROWS, D, TILE, PROGRAMS,
                    )
                    epoch = _barrier(arrived, epoch, PROGRAMS)
                    _attend(
                        wide, wide + D, wide + 2 * D, self_mask, mixed, pid, 3 * D, 3 * D, ROWS,
                        scale, ROWS, HEADS, ROWS, D, PROGRAMS,
                    )
                    epoch = _barrier(arrived, epoch, PROGRAMS)
                    _residual(
                        mixed, w_self + layer * D * D, b_self + layer * D, tokens, cell, pid, D, T,
                        ROWS, D, TILE, PROGRAMS,
                    )
                elif kind == 1:
                    keys = memory + (step * S * LAYERS + layer) * 2 * D
                    _project(
                        tokens, norm, eps, w_q + layer * D * D, b_q + layer * D, wide, pid, False,
                        D, ROWS, D, TILE, PROGRAMS,
                    )
                    epoch = _barrier(arrived, epoch, PROGRAMS)
                    _attend(
                        wide, keys, keys + D, memory_mask, mixed, pid, D, LAYERS * 2 * D, S,
                        scale, MEMORY, HEADS, ROWS, D, PROGRAMS,
                    )
                    epoch = _barrier(arrived, epoch, PROGRAMS)
                    _residual(
                        mixed, w_cross + layer * D * D, b_cross + layer * D, tokens, cell, pid, D,
                        T, ROWS, D, TILE, PROGRAMS,
                    )
                else:
                    _project(
                        tokens, norm, eps, w_up + layer * 4 * D * D, b_up + layer * 4 * D, wide,
                        pid, True, 4 * D, ROWS, D, TILE, PROGRAMS,
                    )
                    epoch = _barrier(arrived, epoch, PROGRAMS)
                    _residual(
                        wide, w_down + layer * 4 * D * D, b_down + layer * D, tokens, cell, pid,
                        4 * D, T, ROWS, D, TILE, PROGRAMS,
                    )
        epoch = _barrier(arrived, epoch, PROGRAMS)
        x = _scheduled(
            x, tokens, norms + N * 2 * D, w_head, b_head, coefficients + step * 6,
            noise + step * T * ACTIONS, eps, clip, T, ROWS, D, ACTIONS, NOISY,
        )
        # Nobody may embed the next step before everybody has read this one's tokens.
        epoch = _barrier(arrived, epoch, PROGRAMS)
    if pid == 0:
        tl.store(_block(x_state, rows, actions, ACTIONS), x)
