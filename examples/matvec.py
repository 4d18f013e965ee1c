"""A layer's product with one row, which a GPU computes as fast as it reads the weights.

What is before and after it costs little more than a kernel of its own would wait: the norm of the
row, a sum with it, the gate of a feed-forward network and the rotation of queries and keys are
computed by the same kernel. Its programs ask for their first weights before they wait for the
kernel in front of it (programmatic dependent launch), since these depend on nothing that a step
computes; and they let the next kernel do the same before they wait themselves.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only build of PyTorch
    triton = None

if triton is not None:

    @triton.jit
    def load_part(
        rows,
        START: tl.constexpr,
        COLUMNS: tl.constexpr,
        NUM_COLUMNS: tl.constexpr,
        POLICY: tl.constexpr,
    ):
        """Elements START to START + COLUMNS of each row; zeros behind its last one."""
        columns = tl.arange(0, COLUMNS)
        if START + COLUMNS <= NUM_COLUMNS:
            part = tl.load(rows + START + columns, eviction_policy=POLICY)
        else:
            inside = columns < NUM_COLUMNS - START
            part = tl.load(rows + START + columns, inside, 0.0, eviction_policy=POLICY)
        return part

    @triton.jit
    def matvec_kernel(
        x,
        weight,
        norm,
        added,
        cos,
        sin,
        out,
        eps,
        NUM_COLUMNS: tl.constexpr,
        APART: tl.constexpr,
        GATED: tl.constexpr,
        NUM_TURNED: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Each program computes ROWS sums, over COLUMNS weights of each at a time."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        if APART > 0:  # the two of a pair in turn: a gate and what it is for, channels of a head
            rows = rows // 2 // APART * 2 * APART + rows // 2 % APART + rows % 2 * APART
        weights = weight + rows[:, None].to(tl.int64) * NUM_COLUMNS
        tile = load_part(weights, 0, COLUMNS, NUM_COLUMNS, "evict_first")
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([COLUMNS], tl.float32)
        for start in tl.static_range(0, NUM_COLUMNS, COLUMNS):
            taken = load_part(x, start, COLUMNS, NUM_COLUMNS, "evict_last").to(tl.float32)
            following = tile
            if start + COLUMNS < NUM_COLUMNS:
                following = load_part(weights, start + COLUMNS, COLUMNS, NUM_COLUMNS, "evict_first")
            if norm is not None:
                squares += taken * taken
                taken *= load_part(norm, start, COLUMNS, NUM_COLUMNS, "evict_last")
            sums += tile.to(tl.float32) * taken[None, :]
            tile = following
        result = tl.sum(sums, 1)
        if norm is not None:
            result *= tl.rsqrt(tl.sum(squares, 0) / NUM_COLUMNS + eps)
        if APART > 0:
            first, second = tl.split(tl.reshape(result, [ROWS // 2, 2]))
        if GATED:
            rows = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
            result = first * tl.sigmoid(first) * second
        if NUM_TURNED > 0:
            channels = rows % (2 * APART)
            other = tl.reshape(tl.join(second, first), [ROWS])
            turned = result * tl.load(cos + channels) + other * tl.load(sin + channels)
            result = tl.where(rows < NUM_TURNED, turned, result)
        if added is not None:
            result += tl.load(added + rows)
        tl.store(out + rows, result.to(out.dtype.element_ty))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `matvec` computes x [T, E] times the transpose of weight [N, E]."""
    num_rows, num_columns = weight.shape
    fits = num_rows % 2 == 0 and num_columns % 8 == 0  # a row begins at a multiple of 16 bytes
    fits = fits and x.is_contiguous() and weight.is_contiguous()
    return x.shape[0] == 1 and x.is_cuda and fits and triton is not None


@torch.library.custom_op("examples::matvec", mutates_args=())
def matvec(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    gated: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    turned_heads: int = 0,
) -> Tensor:
    """norm(x) times the transpose of the weights, plus what is added: [1, N], summed in float32.

    Before something is added, the sums may be gated, or heads that are rotated. All are contiguous,
    and all but cos and sin are of one dtype. Nothing that is still on its way on the stream may
    write the weights: they are read before the kernel waits.

    Args:
        x: [1, E].
        weight: [N, E], or [2 N, E] if gated, with an even number of rows.
        norm: [E], the weights of an RMSNorm (see decoder.RMSNorm); None: x is taken as it is.
        eps: of the norm.
        added: [1, N].
        gated: whether the sums are SwiGLU's: silu of the first N times the others.
        cos: float32 [1, 1, D], of a decoder.Rotation, if the sums are N / D heads, and not gated.
        sin: likewise.
        turned_heads: how many of the first heads are rotated.
    """
    out = new_result(x, weight, gated)
    num_rows, num_columns = weight.shape
    head_size = 0 if cos is None else cos.shape[-1]
    if head_size and (gated or num_rows % head_size):
        raise ValueError(f"cos must be of a head of the {num_rows} sums, got {head_size} channels")
    if num_rows % 2:
        raise ValueError(f"weight must have an even number of rows, got {num_rows}")
    apart = num_rows // 2 if gated else head_size // 2
    rows, columns, warps = tile_of(num_rows, num_columns, normed=norm is not None)
    early = starts_early(x.device)
    with torch.cuda.device(x.device):
        matvec_kernel[(num_rows // rows,)](
            *(x, weight, norm, added, cos, sin, out, eps),
            *(num_columns, apart, gated, turned_heads * head_size, rows, columns, early),
            num_warps=warps,
            launch_pdl=early,
        )
    return out


@matvec.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    gated: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    turned_heads: int = 0,
) -> Tensor:
    return new_result(x, weight, gated)


def new_result(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    """[1, N], not yet written."""
    return x.new_empty(1, weight.shape[0] // 2 if gated else weight.shape[0])


def tile_of(num_rows: int, num_columns: int, normed: bool) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: what was fastest on an H200.

    A norm is read by each program, as much as a row: it has all columns then, if they are few
    enough for 64 weights of a thread.
    """
    if num_columns < 1024 and num_rows > 8192 and num_rows % 4 == 0:
        return 4, 512, 2  # two short rows would take less time than a program takes to start
    most = 2048
    if normed:
        most = 8192 if num_columns % 8192 == 0 else 4096
    columns = min(triton.next_power_of_2(num_columns), most)
    weights_of_thread = 64 if normed and columns >= num_columns else 32
    return 2, columns, max(2 * columns // (32 * weights_of_thread), 1)


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel can wait for the one in front of it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
