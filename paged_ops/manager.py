"""The tensors of a paged KV cache: what ``BlockManager`` decides, as the operators read it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_ops import ops
from paged_ops._block_manager import BlockManager

_CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Batch:
    """What the operators need to know of one step; n sequences, t new tokens in all.

    Attributes:
        block_table: int32 ``[n, max_blocks]``.
        seq_lens: int32 ``[n]``, tokens of each sequence, the new ones included.
        query_start_loc: int32 ``[n + 1]``, where the new tokens of each sequence start; ``None`` in
            a step of one new token each, which needs none.
        slot_mapping: int64 ``[t]``, where the new tokens' keys and values go.
        positions: int64 ``[t]``, the place of each new token in its sequence.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    slot_mapping: Tensor
    positions: Tensor


class PagedAttentionManager:
    """Owns the caches of all layers, and knows where each sequence's tokens lie in them.

    A sequence is known by an id of the caller's choice. Not thread-safe.

    Args:
        num_sequences: how many sequences there can be at a time, the rows of ``block_table``.
        num_heads: KV heads.
        head_size: elements of a head, 1 to 256.
        block_size: tokens of a block.
        num_blocks: blocks of each layer's cache.
        device: where the tensors live.
        dtype: of the caches: float32, float16, bfloat16 or float8_e4m3fn.
        num_layers: how many caches there are. Each is an allocation of its own.
        max_seq_len: tokens that the longest sequence may have; it decides how wide the block table
            is. By default as many as all blocks hold.

    Attributes:
        blocks: the ``BlockManager``.
        caches: one tensor per layer, ``[num_blocks, 2, block_size, num_heads, head_size]``, as
            ``ops.attention`` and ``ops.write_kv`` take it. On a GPU their addresses are marked as
            static, so that compiled steps which write them keep their CUDA graphs.
        max_seq_len: see above.
        max_blocks: the columns of ``block_table``.

    Raises:
        ValueError: an argument out of range, an unknown sequence or one that exists, or a sequence
            that would be longer than ``max_seq_len``.
        OutOfBlocks: too few free blocks. As after every error, nothing has changed.

    Example:
        >>> manager = PagedAttentionManager(2, 4, 64, block_size=16, num_blocks=8, device="cpu")
        >>> manager.add_sequence(7, seq_len=16)
        >>> manager.append(7)
        >>> manager.seq_block_mapping
        {7: [0, 1]}
        >>> manager.batch([7]).slot_mapping
        tensor([16])
    """

    def __init__(
        self,
        num_sequences: int,
        num_heads: int,
        head_size: int,
        block_size: int,
        num_blocks: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float16,
        num_layers: int = 1,
        *,
        max_seq_len: int | None = None,
    ) -> None:
        sizes = {"num_sequences": num_sequences, "num_heads": num_heads, "num_layers": num_layers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= head_size <= 256:
            raise ValueError(f"head_size must be from 1 to 256, got {head_size}")
        if dtype not in _CACHE_DTYPES:
            raise ValueError(f"dtype must be one of {_CACHE_DTYPES}, got {dtype}")
        self.blocks = BlockManager(num_blocks, block_size)
        self.max_seq_len = num_blocks * block_size if max_seq_len is None else max_seq_len
        if self.max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1, got {max_seq_len}")
        self.max_blocks = self.blocks.blocks_for(self.max_seq_len)
        self.device = torch.device(device)
        shape = (num_blocks, 2, block_size, num_heads, head_size)
        self.caches = [self._new_cache(shape, dtype) for _ in range(num_layers)]
        self._rows: dict[int, int] = {}  # of each sequence
        self._free_rows = set(range(num_sequences))
        self._block_table = torch.zeros(
            num_sequences, self.max_blocks, dtype=torch.int32, device=device
        )
        self._seq_lens = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self._stale = False  # the two tensors above lag behind

    def _new_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        cache = torch.zeros(shape, dtype=dtype, device=self.device)
        if cache.is_cuda:
            torch._dynamo.mark_static_address(cache)
        return cache

    @property
    def kv_cache(self) -> Tensor:
        """The first layer's cache as ``[num_blocks, block_size, 2, num_heads, head_size]``.

        A view: ``manager.kv_cache[block, :n, 0] = key`` and ``[block, :n, 1] = value`` write what
        the operators read.
        """
        return self.caches[0].transpose(1, 2)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self.blocks.num_free_blocks

    @property
    def seq_block_mapping(self) -> dict[int, list[int]]:
        """The block ids of each sequence, in the order of its tokens."""
        return {seq_id: self.blocks.blocks(seq_id) for seq_id in self._rows}

    @property
    def rows(self) -> dict[int, int]:
        """The row of ``block_table`` and ``seq_lens`` that each sequence has."""
        return dict(self._rows)

    @property
    def block_table(self) -> Tensor:
        """int32 ``[num_sequences, max_blocks]``, always the same tensor; a row per sequence.

        A sequence has the row of its id where that is free, else the lowest that is. Rows without a
        sequence mean nothing.
        """
        self._refresh()
        return self._block_table

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[num_sequences]``, always the same tensor; 0 in rows without a sequence."""
        self._refresh()
        return self._seq_lens

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether there are blocks for a new sequence of ``num_tokens`` tokens."""
        return self.blocks.blocks_for(num_tokens) <= self.num_free_blocks

    def add_sequence(self, seq_id: int, seq_len: int) -> None:
        """Add a sequence and reserve blocks for ``seq_len`` tokens, which may be 0.

        The caller writes their keys and values.
        """
        self._require_length(seq_id, seq_len)
        self._require_row()
        self.blocks.allocate(seq_id, seq_len)
        self._give_row(seq_id)

    def append(self, seq_ids: int | Sequence[int], num_tokens: int = 1) -> None:
        """Grow one sequence, or each of several, by ``num_tokens`` tokens.

        Blocks that are shared and about to be written are copied, in every layer.
        """
        ids = [seq_ids] if isinstance(seq_ids, int) else list(seq_ids)
        for seq_id in ids:
            self._require_length(seq_id, self.blocks.length(seq_id) + num_tokens)
        pairs = self.blocks.append(ids, num_tokens)
        self._stale = True
        if pairs:
            block_pairs = torch.tensor(pairs, dtype=torch.int64).to(self.device)
            with torch.no_grad():
                for cache in self.caches:
                    ops.copy_blocks(cache, block_pairs)

    def fork(self, parent_id: int, child_id: int) -> None:
        """Add a sequence with the tokens of another; their blocks are shared until written."""
        self._require_row()
        self.blocks.fork(parent_id, child_id)
        self._give_row(child_id)

    def free_sequence(self, seq_id: int) -> None:
        """End a sequence and give up its blocks and its row."""
        self.blocks.free(seq_id)
        self._free_rows.add(self._rows.pop(seq_id))
        self._stale = True

    def slot_mapping(
        self, seq_ids: int | Sequence[int], num_new_tokens: int | Sequence[int] = 1
    ) -> Tensor:
        """Slots of the last tokens of each sequence, end to end, int64 ``[t]``."""
        ids = [seq_ids] if isinstance(seq_ids, int) else seq_ids
        return self.batch(ids, num_new_tokens).slot_mapping

    def batch(
        self,
        seq_ids: Sequence[int],
        num_new_tokens: int | Sequence[int] = 1,
        *,
        pad_to: int = 0,
    ) -> Batch:
        """Describe a step in which the last ``num_new_tokens`` tokens of each sequence are new.

        Args:
            seq_ids: n sequences, in the order of the batch.
            num_new_tokens: for each sequence, or one number for all, from 0 to its length. Their
                keys and values are what the step writes.
            pad_to: at least so many sequences. What is added has length 0 and one new token in no
                slot, at position 0: the operators skip it. Compiled loops then meet fewer sizes;
                PyTorch compiles the size 1 apart from all others.

        Returns:
            New tensors on the manager's device. ``num_new_tokens=1`` gives a ``query_start_loc`` of
            ``None``; a sequence of numbers never does, so that a loop meets one kind of batch.
        """
        ids = list(seq_ids)
        decode = isinstance(num_new_tokens, int) and num_new_tokens == 1
        counts = [num_new_tokens] * len(ids) if isinstance(num_new_tokens, int) else num_new_tokens
        table, lens, starts, slots, positions = self.blocks.batch(ids, counts, self.max_blocks)
        padding = max(pad_to - len(ids), 0)
        num_seqs, num_tokens = len(ids) + padding, sum(counts) + padding
        table.extend(bytes(4 * self.max_blocks * padding))
        lens.extend(bytes(4 * padding))
        starts.extend(array("i", range(sum(counts) + 1, num_tokens + 1)).tobytes())
        slots.extend(array("q", [-1] * padding).tobytes())
        positions.extend(bytes(8 * padding))
        return Batch(
            block_table=self._tensor(table, torch.int32, (num_seqs, self.max_blocks)),
            seq_lens=self._tensor(lens, torch.int32, (num_seqs,)),
            query_start_loc=None if decode else self._tensor(starts, torch.int32, (num_seqs + 1,)),
            slot_mapping=self._tensor(slots, torch.int64, (num_tokens,)),
            positions=self._tensor(positions, torch.int64, (num_tokens,)),
        )

    def _tensor(self, memory: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if not memory:
            return torch.empty(shape, dtype=dtype, device=self.device)
        # Resized in place, not viewed: a compiled step would guard on the size of a view's base.
        return torch.frombuffer(memory, dtype=dtype).resize_(shape).to(self.device)

    def _refresh(self) -> None:
        """Bring the persistent tensors up to what the block manager says."""
        if not self._stale:
            return
        ids, rows = list(self._rows), list(self._rows.values())
        batch = self.batch(ids, 0)
        with torch.no_grad():
            self._seq_lens.zero_()
            self._seq_lens[rows] = batch.seq_lens
            self._block_table[rows] = batch.block_table
        self._stale = False

    def _require_length(self, seq_id: int, seq_len: int) -> None:
        if seq_len > self.max_seq_len:
            raise ValueError(
                f"sequence {seq_id} must have at most max_seq_len={self.max_seq_len} tokens, "
                f"got {seq_len}"
            )

    def _require_row(self) -> None:
        if not self._free_rows:
            raise ValueError(f"all num_sequences={len(self._rows)} sequences are in use")

    def _give_row(self, seq_id: int) -> None:
        row = seq_id if seq_id in self._free_rows else min(self._free_rows)
        self._free_rows.remove(row)
        self._rows[seq_id] = row
        self._stale = True
