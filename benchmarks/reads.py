"""The ceiling: how fast this machine reads, or copies, the same bytes and does nothing else."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from cases import BlockPairs, Rows
from timing import Call
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only build of PyTorch
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["num_tiles"])
    def read_tiles(data, sink, num_tiles, TILE: tl.constexpr):
        """Each program folds every n-th tile into one, its loads all in flight at once."""
        folded = tl.zeros([TILE], tl.int64)
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            start = tile.to(tl.int64) * TILE
            folded ^= tl.load(data + start + tl.arange(0, TILE), eviction_policy="evict_first")
        tl.store(sink + tl.program_id(0), tl.sum(folded))


def triton_reads(memory: Tensor, num_bytes: int) -> dict[str, Call]:
    """Tiles of several sizes, by few and many threads, on grids that stay and one that does not."""
    processors = torch.cuda.get_device_properties(memory.device).multi_processor_count
    data = memory.view(torch.int64)
    reads: dict[str, Call] = {}
    for kilobytes, warps, each in itertools.product((8, 16, 32, 64), (4, 8, 16), (1, 2, 4, 8, 0)):
        tile = kilobytes * 1024 // 8
        if not 64 <= kilobytes * 1024 // (32 * warps) <= 256 or each * warps > 64:
            continue  # 4 to 16 loads of 16 bytes a thread, and no more threads than fit
        num_tiles = num_bytes // 8 // tile
        grid = min(num_tiles, processors * each or num_tiles)
        sink = torch.empty(grid, dtype=torch.int64, device=memory.device)
        launch = functools.partial(read_tiles[(grid,)], data, sink, num_tiles, tile)
        name = f"read {kilobytes} KiB x {warps} warps x {each or 'all'}"
        reads[name] = functools.partial(launch, num_warps=warps)
    return reads


def torch_reads(memory: Tensor, num_bytes: int) -> dict[str, Call]:
    """PyTorch's reductions, whole and by rows that its threads share."""
    words = memory[: num_bytes // 4096 * 4096].view(torch.int64)
    rows = words.view(-1, 512)
    return {
        "read sum": words.sum,
        "read sum of floats": words.view(torch.float32).sum,
        "read max": words.view(torch.int32).max,
        "read sum of rows": lambda: rows.sum(1),
        "read max of rows": lambda: rows.view(torch.int32).amax(1),
    }


def reads(memory: Tensor, num_bytes: int) -> dict[str, Call]:
    """All the ways to read so many bytes of a tensor; the fastest one is the ceiling."""
    flat = memory.view(torch.uint8).flatten()
    if memory.device.type == "cuda" and triton is not None:
        return triton_reads(flat, num_bytes)
    return torch_reads(flat, num_bytes)


def row_copies(batches: Sequence[Rows]) -> list[Call]:
    """PyTorch's copy of the bytes that each batch writes."""
    return [
        functools.partial(source.clone().copy_, source)
        for source in (torch.stack((rows.key, rows.value)) for rows in batches)
    ]


def block_copies(batches: Sequence[BlockPairs]) -> list[Call]:
    """PyTorch's copy of half of each cache to the other half."""
    halves = (pairs.kv_cache.chunk(2) for pairs in batches)
    return [functools.partial(destination.copy_, source) for source, destination in halves]
