"""Blocks of sequences that had to make room, kept in host memory until there is room again.

One layer after the other on the current stream: so of a layer's blocks there is one copy on the
device at a time, whose memory serves the next layer, and what follows on the stream waits for all
of them. On a GPU the host memory is pinned: the host waits for no copy, but where it has no such
memory from an earlier swap, pinning more takes it some time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_ops.step_tensors import send


@dataclass(frozen=True)
class Swapped:
    """A sequence that was swapped out.

    Attributes:
        seq_len: its tokens.
        blocks: for each layer, the bytes of its blocks, uint8 ``[blocks, bytes of a block]``.
    """

    seq_len: int
    blocks: list[Tensor]


def save(caches: Sequence[Tensor], blocks: Sequence[int], seq_len: int) -> Swapped:
    """Copy blocks of each cache to the host; they may be given to others at once."""
    index = send(torch.tensor(blocks, dtype=torch.int64), caches[0].device)
    return Swapped(seq_len, [_to_host(_bytes(cache)[index]) for cache in caches])


def load(swapped: Swapped, caches: Sequence[Tensor], blocks: Sequence[int]) -> None:
    """Copy what was saved into blocks of each cache."""
    device = caches[0].device
    index = send(torch.tensor(blocks, dtype=torch.int64), device)
    for cache, saved in zip(caches, swapped.blocks, strict=True):
        _bytes(cache)[index] = saved.to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _bytes(cache: Tensor) -> Tensor:
    """A contiguous cache as uint8 ``[num_blocks, bytes of a block]``: a copy needs no dtype."""
    return cache.view(cache.shape[0], -1).view(torch.uint8)
