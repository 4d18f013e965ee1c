"""The tensors of decode steps, the same memory in each: written on the host, copied at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paged_ops._block_manager import BlockManager, StepBuffers

_ALIGNMENT = 16  # bytes; Inductor compiles another kernel for inputs that have less


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without waiting for it."""
    if device.type == "cuda":
        # From pinned memory the copy waits in the stream, and the host does not.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class StepViews:
    """One piece of memory, uint8, as the tensors of a step; ``rows`` is their first dimension."""

    memory: Tensor
    slot_mapping: Tensor
    positions: Tensor
    seq_lens: Tensor
    block_table: Tensor

    @classmethod
    @torch.inference_mode(False)  # what inference mode makes can be written in inference mode alone
    def allocate(
        cls, rows: int, max_blocks: int, device: torch.device, pinned: bool = False
    ) -> StepViews:
        """All zero: no rows."""
        # The block table comes last, so that the rows in use end the part that has to be copied.
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int64, (rows,)),
            (torch.int64, (rows,)),
            (torch.int32, (rows,)),
            (torch.int32, (rows, max_blocks)),
        ]
        sizes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes]
        starts = [0]
        for size in sizes:
            starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        memory = torch.zeros(starts[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
        views = [
            memory[start : start + size].view(dtype).view(shape)
            for start, size, (dtype, shape) in zip(starts, sizes, shapes, strict=False)
        ]
        return cls(memory, *views)

    def bytes_of(self, rows: int) -> int:
        """How much of the memory the first rows take."""
        before = int(self.block_table.storage_offset()) * self.block_table.itemsize
        return before + rows * self.block_table[0].nbytes


class _HostStep:
    """What the block manager writes, and when the device has read it."""

    def __init__(self, views: StepViews) -> None:
        self.views = views
        rows, max_blocks = views.block_table.shape
        self.buffers = StepBuffers(
            _array(views.block_table, ctypes.c_int32 * max_blocks * rows),
            _array(views.seq_lens, ctypes.c_int32 * rows),
            _array(views.slot_mapping, ctypes.c_int64 * rows),
            _array(views.positions, ctypes.c_int64 * rows),
        )
        self.copied: torch.cuda.Event | None = None


def _array(tensor: Tensor, kind: type[ctypes.Array[Any]]) -> ctypes.Array[Any]:
    # Not tensor.numpy(): torch runs without numpy.
    return kind.from_address(tensor.data_ptr())


class StepTensors:
    """Appends a token to each sequence of a batch, and shows the result on the device.

    On a GPU the block manager writes pinned memory, of which the rows in use are sent in one
    asynchronous copy on the current stream. Two pieces of it take turns, so that the host prepares
    a step while the copy of the one before waits for its turn.
    """

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        cpu = torch.device("cpu")
        pinned = device.type == "cuda"
        self.on_device = StepViews.allocate(rows, max_blocks, device)
        self._hosts = (
            [_HostStep(self.on_device)]
            if device.type == "cpu"
            else [_HostStep(StepViews.allocate(rows, max_blocks, cpu, pinned)) for _ in range(2)]
        )

    def step(
        self, blocks: BlockManager, seq_ids: Sequence[int], rows: int
    ) -> list[tuple[int, int]]:
        """Bring the first ``rows`` rows up to date; returns the pairs of blocks to copy."""
        host = self._hosts[0]
        if host.copied is not None:
            host.copied.synchronize()
        pairs = blocks.step(seq_ids, host.buffers)
        if host.views is not self.on_device:
            used = host.views.bytes_of(rows)
            self.on_device.memory[:used].copy_(host.views.memory[:used], non_blocking=True)
            if self.on_device.memory.is_cuda:
                host.copied = torch.cuda.Event()
                host.copied.record(torch.cuda.current_stream(self.on_device.memory.device))
            self._hosts.reverse()
        return pairs
