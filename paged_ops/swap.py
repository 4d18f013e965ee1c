"""Blocks of sequences that had to make room, kept in host memory until there is room again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Swapped:
    """A sequence that was swapped out.

    Attributes:
        seq_len: its tokens.
        blocks: for each layer, the bytes of its blocks, uint8 ``[blocks, bytes of a block]``.
    """

    seq_len: int
    blocks: list[Tensor]


class SwapSpace:
    """Copies blocks to host memory and back.

    On a GPU the host memory is pinned and the copies run on a stream of their own. Blocks are
    gathered and scattered on the current stream, so that what it does before and after sees them
    in order, and blocks may be given to others as soon as ``save`` returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def save(self, caches: Sequence[Tensor], blocks: Sequence[int], seq_len: int) -> Swapped:
        """Copy blocks of each cache to the host."""
        index = torch.tensor(blocks, dtype=torch.int64).to(caches[0].device)
        gathered = [_bytes(cache)[index] for cache in caches]
        if self._stream is None:
            return Swapped(seq_len, gathered)
        self._stream.wait_stream(torch.cuda.current_stream(caches[0].device))
        with torch.cuda.stream(self._stream):
            copies = [torch.empty_like(each, device="cpu", pin_memory=True) for each in gathered]
            for copy, each in zip(copies, gathered, strict=True):
                copy.copy_(each, non_blocking=True)
                each.record_stream(self._stream)
        return Swapped(seq_len, copies)

    def load(self, swapped: Swapped, caches: Sequence[Tensor], blocks: Sequence[int]) -> None:
        """Copy what was saved into blocks of each cache."""
        device = caches[0].device
        index = torch.tensor(blocks, dtype=torch.int64).to(device)
        arrived = swapped.blocks
        if self._stream is not None:
            current = torch.cuda.current_stream(device)
            with torch.cuda.stream(self._stream):
                arrived = [each.to(device, non_blocking=True) for each in swapped.blocks]
            current.wait_stream(self._stream)
            for each in arrived:
                each.record_stream(current)
        for cache, each in zip(caches, arrived, strict=True):
            _bytes(cache)[index] = each


def _bytes(cache: Tensor) -> Tensor:
    """A contiguous cache as uint8 ``[num_blocks, bytes of a block]``: a copy needs no dtype."""
    return cache.view(cache.shape[0], -1).view(torch.uint8)
