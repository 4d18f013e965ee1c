"""The product of one row with a matrix of weights, which a GPU does as fast as it reads them.

A program of the kernel asks for its first weights before it waits for the kernel in front of it
(programmatic dependent launch): they depend on nothing that a step computes.
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
    def matvec_kernel(
        x,
        weight,
        out,
        NUM_COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Each program computes ROWS sums, over COLUMNS weights of each at a time."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        pointers = weight + rows[:, None].to(tl.int64) * NUM_COLUMNS + columns[None, :]
        tile = tl.load(pointers, eviction_policy="evict_first")
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.static_range(0, NUM_COLUMNS, COLUMNS):
            taken = tl.load(x + start + columns, eviction_policy="evict_last").to(tl.float32)
            following = tile
            if start + COLUMNS < NUM_COLUMNS:
                following = tl.load(pointers + start + COLUMNS, eviction_policy="evict_first")
            sums += tile.to(tl.float32) * taken[None, :]
            tile = following
        tl.store(out + rows, tl.sum(sums, 1).to(out.dtype.element_ty))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `matvec` computes x [T, E] times the transpose of weight [N, E]."""
    num_rows, num_columns = weight.shape
    fits = num_rows % 2 == 0 and num_columns % 1024 == 0
    fits = fits and x.is_contiguous() and weight.is_contiguous()
    return x.shape[0] == 1 and x.is_cuda and fits and triton is not None


@torch.library.custom_op("examples::matvec", mutates_args=())
def matvec(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x [1, E] and the transpose of weight [N, E]: [1, N], summed in float32.

    Both are contiguous and of one dtype; N is even, E a multiple of 1024. Nothing that is still on
    its way on the stream may write the weights: they are read before the kernel waits.
    """
    num_rows, num_columns = weight.shape
    out = x.new_empty(1, num_rows)
    rows, columns, warps = tile_of(num_columns)
    early = starts_early(x.device)
    with torch.cuda.device(x.device):
        matvec_kernel[(num_rows // rows,)](
            *(x, weight, out, num_columns, rows, columns, early), num_warps=warps, launch_pdl=early
        )
    return out


@matvec.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(1, weight.shape[0])


def tile_of(num_columns: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program; each thread asks for 16 weights at once."""
    columns = 2048 if num_columns % 2048 == 0 else 1024
    rows = 2 if num_columns <= 8192 else 1
    return rows, columns, rows * columns // (16 * 32)


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel can wait for the one in front of it."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
