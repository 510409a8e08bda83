"""The Triton kernels: shrink, base + expand, both in one, gradients of gates and experts; every sum in a fixed order.

Rows of x meet their experts in one of two forms:

* INSTANCE: a tile of rows belongs to one instance. Column c of the tile's rank space is (k, r) = (c // RANK, c % RANK),
  its expert experts[i, k]: an adapter of rank K·R with the gates folded in.
* otherwise a tile may hold rows of many instances. Column c is (e, r): all experts, zero where a row does not use e.

RANK is R rounded up to a power of two of at least 16, C columns are worked on at a time, a multiple of RANK
where rows of many instances meet.
h, ds [T, K·R] hold the shrunk x and dy, without gates and scale. 1 / (1 - p) of dropout is part of `scale`.
"""

# pyright: reportGeneralTypeIssues=false
# (a jit function called from Python raises, so that pyright takes its result for NoReturn)
import triton
import triton.language as tl

from moe_lora.backend.triton.dropout import kept

# Numbers that change from batch to batch: no new compilation for their divisibility.
_BATCH = ("seed", "threshold", "T", "N", "L", "steps", "E", "tiles", "groups", "splits", "count")


@triton.jit(do_not_specialize=_BATCH)
def shrink_kernel(
    x_ptr, lora_ptr, lora1_ptr, lora2_ptr, h_ptr, h1_ptr, h2_ptr, experts_ptr, offsets_ptr, seed, threshold,
    T, N, L, steps, D, E, splits, stride_xt, stride_le, stride_lr, stride_ld,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    INSTANCE: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h[t, k, r] = Σ_d drop(x)[t, d] lora[e_k, d, r], over one of `splits` parts of D.

    Grid: tiles of rows, groups of C columns, splits. h [splits, T, K·R]. Also ds from dy and B, with d a column of dy.
    lora1 and lora2, if not None, are other members' A for the same x, which is read and dropped once.
    """
    pid_t, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, mask_t, i = _rows(pid_t, offsets_ptr, T, N, L, steps, INSTANCE, PACKED, BLOCK_T)
    slot, e, r, mask_c = _columns(group, experts_ptr, i, E, K, R, RANK, C, INSTANCE)
    if not INSTANCE and not _any_use(experts_ptr, i, mask_t, group, K, C // RANK, BLOCK_T):
        return
    per_split = tl.cdiv(tl.cdiv(D, BLOCK_D), splits)
    begin = split * per_split * BLOCK_D
    offs_d = begin + tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xt + offs_d[None, :]
    lora_at = e.to(tl.int64)[None, :] * stride_le + r[None, :] * stride_lr
    lora_at += offs_d.to(tl.int64)[:, None] * stride_ld
    acc = tl.zeros((BLOCK_T, C), tl.float32)
    acc1 = acc
    acc2 = acc
    for start in range(begin, min(begin + per_split * BLOCK_D, D), BLOCK_D):
        mask_d = start + tl.arange(0, BLOCK_D) < D
        mask = mask_c[None, :] if EVEN_D else mask_d[:, None] & mask_c[None, :]
        x = tl.load(x_ptrs, mask=mask_t[:, None] if EVEN_D else mask_t[:, None] & mask_d[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(kept(seed, threshold, rows, start, D, BLOCK_T, BLOCK_D, PAIRED, WIDE), x, 0.0)
        acc = tl.dot(x, tl.load(lora_ptr + lora_at, mask=mask, other=0.0).to(x.dtype), acc, input_precision=PRECISION)
        if lora1_ptr is not None:
            lora = tl.load(lora1_ptr + lora_at, mask=mask, other=0.0)
            acc1 = tl.dot(x, lora.to(x.dtype), acc1, input_precision=PRECISION)
        if lora2_ptr is not None:
            lora = tl.load(lora2_ptr + lora_at, mask=mask, other=0.0)
            acc2 = tl.dot(x, lora.to(x.dtype), acc2, input_precision=PRECISION)
        x_ptrs += BLOCK_D
        lora_at += BLOCK_D * stride_ld
    at = (split.to(tl.int64) * T + rows.to(tl.int64))[:, None] * (K * R)
    _store_ranks(h_ptr, acc, at, experts_ptr, i, mask_t, slot, e, r, mask_c, K, R, INSTANCE)
    if lora1_ptr is not None:
        _store_ranks(h1_ptr, acc1, at, experts_ptr, i, mask_t, slot, e, r, mask_c, K, R, INSTANCE)
    if lora2_ptr is not None:
        _store_ranks(h2_ptr, acc2, at, experts_ptr, i, mask_t, slot, e, r, mask_c, K, R, INSTANCE)


@triton.jit(do_not_specialize=_BATCH)
def expand_kernel(
    x_ptr, x1_ptr, x2_ptr, weight_ptr, weight1_ptr, weight2_ptr, bias_ptr, lora_ptr, lora1_ptr, lora2_ptr,
    h_ptr, h1_ptr, h2_ptr, y_ptr, experts_ptr, gates_ptr, offsets_ptr, seed, threshold, scale,
    T, N, L, steps, D, D1, D2, F, E, tiles, groups,
    stride_xt, stride_x1t, stride_x2t, stride_wd, stride_wf, stride_le, stride_lr, stride_lf,
    MEMBERS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    INSTANCE: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y[t, f] = bias[f] + drop(Σ_k s g_k h[t, k] lora[e_k, :, f]) + Σ_d x[t, d] weight[d, f].

    The low-rank part is the first step of the sum over d, in the same accumulator. Forward: no dropout here. Also
    dx from dy, where f is a column of x, d one of dy, lora is A transposed and h is ds. x1 and x2 are other
    MEMBERS' dy, with their weight, lora and h: one sum over all.
    """
    pid_t, pid_f = _banded(tl.program_id(0), tiles, tl.cdiv(F, BLOCK_F), BAND)
    rows, mask_t, i = _rows(pid_t, offsets_ptr, T, N, L, steps, INSTANCE, PACKED, BLOCK_T)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for member in tl.static_range(MEMBERS):
        acc = _add_ranks(
            acc, _of(member, h_ptr, h1_ptr, h2_ptr), _of(member, lora_ptr, lora1_ptr, lora2_ptr),
            experts_ptr, gates_ptr, scale, rows, mask_t, i, offs_f, mask_f, dtype, E, groups,
            stride_le, stride_lr, stride_lf, K, R, RANK, C, INSTANCE, BLOCK_T, PRECISION,
        )  # fmt: skip
    if DROPOUT:
        acc = tl.where(kept(seed, threshold, rows, pid_f * BLOCK_F, F, BLOCK_T, BLOCK_F, PAIRED, WIDE), acc, 0.0)
    offs_d = tl.arange(0, BLOCK_D)
    for member in tl.static_range(MEMBERS):
        x_ptrs = _of(member, x_ptr, x1_ptr, x2_ptr) + offs_d[None, :]
        x_ptrs += rows.to(tl.int64)[:, None] * _of(member, stride_xt, stride_x1t, stride_x2t)
        weight_ptrs = _of(member, weight_ptr, weight1_ptr, weight2_ptr)
        weight_ptrs += offs_d.to(tl.int64)[:, None] * stride_wd + offs_f.to(tl.int64)[None, :] * stride_wf
        depth = _of(member, D, D1, D2)
        for start in range(0, depth, BLOCK_D):
            mask_d = start + offs_d < depth
            if EVEN_D:
                x = tl.load(x_ptrs, mask=mask_t[:, None], other=0.0)
                weight = tl.load(weight_ptrs, mask=mask_f[None, :], other=0.0)
            else:
                x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
                weight = tl.load(weight_ptrs, mask=mask_d[:, None] & mask_f[None, :], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
            x_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D * stride_wd
    _store_tile(y_ptr, acc, bias_ptr, rows, mask_t, offs_f, mask_f, F, BIAS)


@triton.jit(do_not_specialize=_BATCH)
def ranks_kernel(
    bias_ptr, lora_ptr, lora1_ptr, lora2_ptr, h_ptr, h1_ptr, h2_ptr, y_ptr, experts_ptr, gates_ptr, offsets_ptr,
    seed, threshold, scale, T, N, L, steps, F, E, tiles, groups, stride_le, stride_lr, stride_lf,
    MEMBERS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    INSTANCE: tl.constexpr, PACKED: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y[t, f] = bias[f] + drop(Σ_k s g_k h[t, k] lora[e_k, :, f]): all of `expand_kernel` but the base's product.

    A library's product accumulates on it. The arguments are those of `expand_kernel`.
    """
    pid_t, pid_f = _banded(tl.program_id(0), tiles, tl.cdiv(F, BLOCK_F), BAND)
    rows, mask_t, i = _rows(pid_t, offsets_ptr, T, N, L, steps, INSTANCE, PACKED, BLOCK_T)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for member in tl.static_range(MEMBERS):
        acc = _add_ranks(
            acc, _of(member, h_ptr, h1_ptr, h2_ptr), _of(member, lora_ptr, lora1_ptr, lora2_ptr),
            experts_ptr, gates_ptr, scale, rows, mask_t, i, offs_f, mask_f, y_ptr.dtype.element_ty, E, groups,
            stride_le, stride_lr, stride_lf, K, R, RANK, C, INSTANCE, BLOCK_T, PRECISION,
        )  # fmt: skip
    if DROPOUT:
        acc = tl.where(kept(seed, threshold, rows, pid_f * BLOCK_F, F, BLOCK_T, BLOCK_F, PAIRED, WIDE), acc, 0.0)
    _store_tile(y_ptr, acc, bias_ptr, rows, mask_t, offs_f, mask_f, F, BIAS)


@triton.jit(do_not_specialize=_BATCH)
def fused_kernel(
    x_desc, weight_desc, bias_ptr, shrink_ptr, lora_ptr, h_ptr, y_ptr, ready_ptr, experts_ptr, gates_ptr, offsets_ptr,
    seed, threshold, scale, T, N, L, steps, D, F, E, tiles, groups,
    stride_se, stride_sr, stride_sd, stride_le, stride_lr, stride_lf,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    PACKED: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_D: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """h as `shrink_kernel` and y as `expand_kernel` make them, in one launch that reads x once; INSTANCE form alone.

    Programs that are all on the device at once (a cooperative launch of at least PARTS) walk over the tiles of y. Of
    each row of tiles the first PARTS come before all others; beside its product each of them shrinks the x that it has
    in shared memory for C columns of the rank space, and counts itself in ready[tile of rows]. Who expands waits for
    PARTS there: for parts that have begun, since every program takes its tiles in this order.
    x_desc [T, D], weight_desc [F, D] if TRANSPOSED, else [D, F]; columns of x beyond D read as 0.
    """
    columns = tl.cdiv(F, BLOCK_F)
    for number in range(tl.program_id(0), tiles * columns, tl.num_programs(0)):
        pid_t = number // PARTS
        pid_f = number - pid_t * PARTS
        if number >= tiles * PARTS:
            pid_t, pid_f = _banded(number - tiles * PARTS, tiles, columns - PARTS, BAND)
            pid_f += PARTS
        first, end, i = _tile(pid_t, offsets_ptr, N, L, steps, PACKED, BLOCK_T)
        if first < end:
            rows = first + tl.arange(0, BLOCK_T)
            mask_t = rows < end
            first_f = pid_f * BLOCK_F
            acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
            if pid_f < PARTS:
                slot, e, r, mask_c = _columns(pid_f, experts_ptr, i, E, K, R, RANK, C, True)
                part_ptrs = shrink_ptr + e.to(tl.int64) * stride_se + r * stride_sr
                acc_h = tl.zeros((BLOCK_T, C), tl.float32)
                for start in range(0, D, BLOCK_D):
                    x = x_desc.load([first, start])
                    acc = tl.dot(x, _box(weight_desc, start, first_f, TRANSPOSED), acc, input_precision=PRECISION)
                    offs_d = start + tl.arange(0, BLOCK_D)
                    lora_ptrs = part_ptrs[None, :] + offs_d.to(tl.int64)[:, None] * stride_sd
                    mask = mask_c[None, :] if EVEN_D else (offs_d < D)[:, None] & mask_c[None, :]
                    lora = tl.load(lora_ptrs, mask=mask, other=0.0)
                    if DROPOUT:
                        x = tl.where(kept(seed, threshold, rows, start, D, BLOCK_T, BLOCK_D, PAIRED, WIDE), x, 0.0)
                    acc_h = tl.dot(x, lora.to(x.dtype), acc_h, input_precision=PRECISION)
                at = rows.to(tl.int64)[:, None] * (K * R)
                _store_ranks(h_ptr, acc_h, at, experts_ptr, i, mask_t, slot, e, r, mask_c, K, R, True)
                tl.debug_barrier()  # all of the part before the one thread that says so
                tl.atomic_add(ready_ptr + pid_t, 1, sem="release")
            else:
                for start in range(0, D, BLOCK_D):
                    x = x_desc.load([first, start])
                    acc = tl.dot(x, _box(weight_desc, start, first_f, TRANSPOSED), acc, input_precision=PRECISION)
            while tl.atomic_add(ready_ptr + pid_t, 0, sem="acquire") < PARTS:
                pass
            offs_f = first_f + tl.arange(0, BLOCK_F)
            mask_f = offs_f < F
            acc = _add_ranks(
                acc, h_ptr, lora_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, offs_f, mask_f,
                y_ptr.dtype.element_ty, E, groups, stride_le, stride_lr, stride_lf, K, R, RANK, STEP, True, BLOCK_T,
                PRECISION,
            )  # fmt: skip
            _store_tile(y_ptr, acc, bias_ptr, rows, mask_t, offs_f, mask_f, F, BIAS)


@triton.jit
def _box(desc, d, f, TRANSPOSED: tl.constexpr):
    """A tile of the weight, [BLOCK_D, BLOCK_F]."""
    if TRANSPOSED:
        return desc.load([f, d]).T
    else:
        return desc.load([d, f])


@triton.jit(do_not_specialize=_BATCH)
def expert_grad_kernel(
    h_ptr, h1_ptr, h2_ptr, x_ptr, out_ptr, out1_ptr, out2_ptr, experts_ptr, gates_ptr, offsets_ptr,
    seed, threshold, scale, T, N, L, steps, D, E, splits, stride_xt, stride_oe, stride_or, stride_od,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    INSTANCE: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, PAIRED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[e, r, d] = Σ_t (s g h)[t, e, r] drop(x)[t, d] over the rows t that use e, in one of `splits` parts.

    Grid: blocks of D, groups of C // RANK experts, splits. out [splits, E, ...]. dB from h and dy, dA from ds and x.
    INSTANCE walks the instances, passes over those that use none of the experts and splits each; otherwise all rows
    are one run. h1 and h2, if not None, are other members' ds of the same x, which is read and dropped once.
    """
    pid_d, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    slot, e, r, mask_c = _columns(group, experts_ptr, 0, E, K, R, RANK, C, False)
    first_expert = group * (C // RANK)
    acc = tl.zeros((BLOCK_D, C), tl.float32)
    acc1 = acc
    acc2 = acc
    for run in range(0, N if INSTANCE else 1):
        if INSTANCE:
            begin, end = _span(run, offsets_ptr, L, PACKED)
            used = 0
            for k in tl.static_range(K):
                pick = tl.load(experts_ptr + run * K + k)
                used = tl.where((pick >= first_expert) & (pick < first_expert + C // RANK), 1, used)
            per_split = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_T) * BLOCK_T
            begin += split * per_split
            end = tl.where(used > 0, min(begin + per_split, end), begin)
        else:
            per_split = tl.cdiv(tl.cdiv(T, splits), BLOCK_T) * BLOCK_T
            begin = split * per_split
            end = min(begin + per_split, T)
        for start in range(begin, end, BLOCK_T):
            rows = start + tl.arange(0, BLOCK_T)
            mask_t = rows < end
            i = rows * 0 + run if INSTANCE else _instance_of(rows, offsets_ptr, N, L, steps, PACKED)
            s = _folded(h_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, slot, e, r, mask_c, K, R, False)
            x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xt + offs_d[None, :]
            x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            if DROPOUT:
                x = tl.where(kept(seed, threshold, rows, pid_d * BLOCK_D, D, BLOCK_T, BLOCK_D, PAIRED, WIDE), x, 0.0)
            acc = tl.dot(tl.trans(x), s.to(x.dtype), acc, input_precision=PRECISION)
            if h1_ptr is not None:
                s = _folded(h1_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, slot, e, r, mask_c, K, R, False)
                acc1 = tl.dot(tl.trans(x), s.to(x.dtype), acc1, input_precision=PRECISION)
            if h2_ptr is not None:
                s = _folded(h2_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, slot, e, r, mask_c, K, R, False)
                acc2 = tl.dot(tl.trans(x), s.to(x.dtype), acc2, input_precision=PRECISION)
    at = (split.to(tl.int64) * E + e.to(tl.int64))[None, :] * stride_oe + r[None, :] * stride_or
    at += offs_d.to(tl.int64)[:, None] * stride_od
    mask = mask_d[:, None] & mask_c[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if h1_ptr is not None:
        tl.store(out1_ptr + at, acc1.to(out1_ptr.dtype.element_ty), mask=mask)
    if h2_ptr is not None:
        tl.store(out2_ptr + at, acc2.to(out2_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_BATCH)
def gate_grad_kernel(
    ds_ptr, h_ptr, dgates_ptr, offsets_ptr, scale, L,
    K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dgates[i, k] = s Σ_t <ds[t, k], h[t, k]> over the rows of instance i. Grid: instances, K."""
    i, k = tl.program_id(0), tl.program_id(1)
    begin, end = _span(i, offsets_ptr, L, PACKED)
    r = tl.arange(0, RANK)
    total = tl.zeros((BLOCK_T, RANK), tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        at = rows.to(tl.int64)[:, None] * (K * R) + (k * R + r)[None, :]
        mask = (rows < end)[:, None] & (r < R)[None, :]
        ds = tl.load(ds_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += ds * tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.sum(tl.sum(total, 1), 0) * scale
    tl.store(dgates_ptr + i * K + k, dgate.to(dgates_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=_BATCH)
def sum_kernel(parts_ptr, out_ptr, count, splits, BLOCK: tl.constexpr):
    """out[j] = Σ_s parts[s, j], in the order of s."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += count
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_ranks(
    acc, h_ptr, lora_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, offs_f, mask_f, dtype: tl.constexpr, E,
    groups, stride_le, stride_lr, stride_lf, K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    INSTANCE: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + Σ_k s g_k h[t, k] lora[e_k, :, f]."""
    for group in tl.range(0, groups, num_stages=1):
        if INSTANCE or _any_use(experts_ptr, i, mask_t, group, K, C // RANK, BLOCK_T):
            slot, e, r, mask_c = _columns(group, experts_ptr, i, E, K, R, RANK, C, INSTANCE)
            s = _folded(h_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, slot, e, r, mask_c, K, R, INSTANCE)
            lora_ptrs = lora_ptr + e.to(tl.int64)[:, None] * stride_le + r[:, None] * stride_lr
            lora_ptrs += offs_f.to(tl.int64)[None, :] * stride_lf
            lora = tl.load(lora_ptrs, mask=mask_c[:, None] & mask_f[None, :], other=0.0)
            acc = tl.dot(s.to(dtype), lora.to(dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_tile(y_ptr, acc, bias_ptr, rows, mask_t, offs_f, mask_f, F, BIAS: tl.constexpr):
    """Writes a tile of y, with the bias."""
    if BIAS:
        acc += tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * F + offs_f[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_f[None, :])


@triton.jit
def _of(member: tl.constexpr, first, second, third):
    """What belongs to this member of three."""
    if member == 0:
        return first
    elif member == 1:
        return second
    else:
        return third


@triton.jit
def _rows(pid, offsets_ptr, T, N, L, steps, INSTANCE: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr):
    """Rows of a tile, which of them exist, and their instance: one number if INSTANCE, else one a row."""
    if INSTANCE:
        first, end, i = _tile(pid, offsets_ptr, N, L, steps, PACKED, BLOCK_T)
        rows = first + tl.arange(0, BLOCK_T)
        mask_t = rows < end
    else:
        rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = rows < T
        i = _instance_of(rows, offsets_ptr, N, L, steps, PACKED)
    return rows, mask_t, i


@triton.jit
def _tile(pid, offsets_ptr, N, L, steps, PACKED: tl.constexpr, BLOCK_T: tl.constexpr):
    """First row of a tile of one instance, the row after the instance's last, and the instance.

    Packed instances own the tiles from offsets[i] // BLOCK_T + i on: enough for each whatever its length, known without
    a table, at most one without rows for each instance. (vLLM's unified attention finds its sequences so.)
    """
    if PACKED:
        i = _last(offsets_ptr, pid, N, steps, BLOCK_T)
        begin, end = _span(i, offsets_ptr, L, PACKED)
        first = begin + (pid - begin // BLOCK_T - i) * BLOCK_T
    else:
        per_instance = tl.cdiv(L, BLOCK_T)
        i = pid // per_instance
        begin, end = _span(i, offsets_ptr, L, PACKED)
        first = begin + pid % per_instance * BLOCK_T
    return first, end, i


@triton.jit
def _span(i, offsets_ptr, L, PACKED: tl.constexpr):
    """First row of an instance and the row after its last."""
    if PACKED:
        begin, end = tl.load(offsets_ptr + i), tl.load(offsets_ptr + i + 1)
    else:
        begin, end = i * L, i * L + L
    return begin, end


@triton.jit
def _instance_of(rows, offsets_ptr, N, L, steps, PACKED: tl.constexpr):
    """Instance of each row; N - 1 for rows after the last."""
    return _last(offsets_ptr, rows, N, steps, 0) if PACKED else tl.minimum(rows // L, N - 1)


@triton.jit
def _last(offsets_ptr, value, N, steps, BLOCK_T: tl.constexpr):
    """The largest i < N with offsets[i] <= value, or with offsets[i] // BLOCK_T + i <= value; `steps` >= log2 N."""
    low = value * 0
    high = low + N - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        start = tl.load(offsets_ptr + middle)
        if BLOCK_T > 0:
            start = start // BLOCK_T + middle
        low = tl.where(start <= value, middle, low)
        high = tl.where(start <= value, high, middle - 1)
    return low


@triton.jit
def _columns(
    group, experts_ptr, i, E, K: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
    INSTANCE: tl.constexpr,
):  # fmt: skip
    """What C columns of the rank space are: k or e, expert, place in the rank, and which exist; each [C]."""
    c = group * C + tl.arange(0, C)
    slot, r = c // RANK, c % RANK
    if INSTANCE:
        mask_c = (slot < K) & (r < R)
        # of one value over each expert's columns: without that hint the compiler would load A and B element by element
        e = tl.max_constancy(tl.load(experts_ptr + i * K + slot, mask=slot < K, other=0), [min(C, RANK)])
    else:
        mask_c = (slot < E) & (r < R)
        e = slot
    return slot, e, r, mask_c


@triton.jit
def _any_use(experts_ptr, i, mask_t, group, K: tl.constexpr, SIZE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether a row of the tile uses one of the group's SIZE experts; i as one a row."""
    used = tl.zeros((BLOCK_T,), tl.int32)
    for k in tl.static_range(K):
        pick = tl.load(experts_ptr + i * K + k, mask=mask_t, other=-1)
        used |= ((pick >= group * SIZE) & (pick < group * SIZE + SIZE)).to(tl.int32)
    return tl.max(used, 0) > 0


@triton.jit
def _folded(
    h_ptr, experts_ptr, gates_ptr, scale, rows, mask_t, i, slot, e, r, mask_c,
    K: tl.constexpr, R: tl.constexpr, INSTANCE: tl.constexpr,
):  # fmt: skip
    """s g h by row and column, float32 [BLOCK_T, C]; zero where the row does not use the column's expert."""
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * (K * R)
    if INSTANCE:
        gate = tl.load(gates_ptr + i * K + slot, mask=mask_c, other=0.0).to(tl.float32) * scale
        h = tl.load(h_ptrs + (slot * R + r)[None, :], mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        s = h.to(tl.float32) * gate[None, :]
    else:
        s = tl.zeros((rows.shape[0], r.shape[0]), tl.float32)
        for k in tl.static_range(K):
            pick = tl.load(experts_ptr + i * K + k, mask=mask_t, other=-1)
            gate = tl.load(gates_ptr + i * K + k, mask=mask_t, other=0.0).to(tl.float32) * scale
            hit = (pick[:, None] == e[None, :]) & mask_c[None, :]
            h = tl.load(h_ptrs + (k * R + r)[None, :], mask=hit, other=0.0).to(tl.float32)
            s += tl.where(hit, h * gate[:, None], 0.0)
    return s


@triton.jit
def _store_ranks(
    h_ptr, acc, at, experts_ptr, i, mask_t, slot, e, r, mask_c,
    K: tl.constexpr, R: tl.constexpr, INSTANCE: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the shrink to its rows of h, which start at `at`."""
    acc = acc.to(h_ptr.dtype.element_ty)
    if INSTANCE:
        tl.store(h_ptr + at + (slot * R + r)[None, :], acc, mask=mask_t[:, None] & mask_c[None, :])
    else:
        for k in tl.static_range(K):
            pick = tl.load(experts_ptr + i * K + k, mask=mask_t, other=-1)
            tl.store(h_ptr + at + (k * R + r)[None, :], acc, mask=(pick[:, None] == e[None, :]) & mask_c[None, :])


@triton.jit
def _banded(pid, tiles, columns, BAND: tl.constexpr):
    """Row tile and column tile: BAND row tiles go through all columns together, so that both operands stay in L2."""
    band = pid // (BAND * columns)
    first = band * BAND
    height = min(tiles - first, BAND)
    within = pid % (BAND * columns)
    return first + within % height, within // height
