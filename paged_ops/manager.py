"""The tensors of a paged KV cache: what ``BlockManager`` decides, as the operators read it."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor

from paged_ops import ops, swap
from paged_ops._block_manager import BlockManager
from paged_ops.step_tensors import StepTensors, send

if TYPE_CHECKING:
    from paged_ops._block_manager import Integers

_LONGEST = 2**31 - 1  # lengths are int32
_CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def _integer(name: str, value: SupportsIndex) -> int:
    """An integer of Python, numpy or torch as Python's own."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be int, got {value!r}") from None
    if number.bit_length() > 63:
        raise ValueError(f"{name} must have at most 63 bits, got {number}")
    return number


def _integers(name: str, values: int | Iterable[int]) -> int | list[int]:
    """An integer, or several."""
    tolist = getattr(values, "tolist", None)  # of tensors and arrays: numbers of Python's own
    values = values if tolist is None else tolist()
    if not isinstance(values, Iterable):
        return _integer(name, values)
    numbers = list(values)
    try:
        return array("q", numbers).tolist()  # all at once: a step calls this for its sequences
    except (TypeError, OverflowError):
        return [_integer(name, number) for number in numbers]


def _list(name: str, values: int | Iterable[int]) -> list[int]:
    """Several integers, or the only one."""
    numbers = _integers(name, values)
    return [numbers] if isinstance(numbers, int) else numbers


@dataclass(frozen=True)
class Batch:
    """What the operators need to know of one step; n sequences, t new tokens in all.

    Attributes:
        block_table: int32 ``[n, max_blocks]``; past a sequence's last block it may hold anything.
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


torch.export.register_dataclass(Batch, serialized_type_name="paged_ops.Batch")


class PagedAttentionManager:
    """Owns the caches of all layers, and knows where each sequence's tokens lie in them.

    A sequence is known by an id of the caller's choice. What changes no tensor is asked of
    ``blocks`` itself: ``publish``, ``lookup``, ``pin``, ``unpin`` and ``reset_prefix_cache`` for
    prefixes, ``length``, ``blocks``, ``state``, ``check`` and its properties. What changes
    sequences must not be called there, but here: ``allocate``, ``append``, ``reserve``,
    ``truncate``, ``fork``, ``preempt``, ``free``, ``share`` and ``step``. The manager belongs to
    one thread at a time; its ``blocks`` may be shared.

    Ids and numbers of tokens may be integers of numpy too, and where several are taken any
    iterable of them, or a tensor; for one on a GPU the host waits.

    Args:
        num_sequences: how many sequences there can be at a time, the rows of ``block_table``.
        num_heads: KV heads.
        head_size: elements of a head, 1 to 256.
        block_size: tokens of a block.
        num_blocks: blocks of each layer's cache.
        device: where the tensors live.
        dtype: of the caches: float32, float16, bfloat16 or float8_e4m3fn.
        num_layers: how many caches there are. Each is an allocation of its own.
        max_seq_len: tokens that the longest sequence may have. By default as many as all blocks
            hold, which is seldom what a model takes and has a price: each row of ``block_table``,
            of a ``batch`` and of a ``step`` is as wide as the longest sequence has blocks, and
            ``step`` sends its rows in full.
        watermark: blocks that a new sequence leaves for those that are there.

    Attributes:
        blocks: the ``BlockManager``.
        caches: one tensor per layer, ``[num_blocks, 2, block_size, num_heads, head_size]``, as
            ``ops.attention`` and ``ops.write_kv`` take it. On a GPU their addresses are marked as
            static, so that compiled steps which write them keep their CUDA graphs.
        num_sequences: see above.
        max_seq_len: see above.
        max_blocks: the columns of ``block_table``.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range, an unknown sequence or one that exists, or a sequence
            that would be longer than ``max_seq_len``.
        OutOfBlocks: too few free blocks.
        torch.OutOfMemoryError: ``swap_out`` or ``swap_in`` found no room for a layer's blocks
            beside the caches.
        RuntimeError: ``swap_out`` found no host memory for a layer's blocks.

        After each of these sequences and tensors are as before; of cached prefixes, ``swap_in`` may
        have evicted some. ``append``, ``reserve`` and ``step`` check all of this, take the blocks,
        and then enqueue copies: of shared blocks, and of what a step changes. That allocates
        nothing on the device, and fails only if the device itself has failed or if no host memory
        can be pinned; the manager must not be used after that.

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
        watermark: int = 0,
    ) -> None:
        sizes = {
            "num_sequences": num_sequences,
            "num_heads": num_heads,
            "block_size": block_size,
            "num_blocks": num_blocks,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            if _integer(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= _integer("head_size", head_size) <= 256:
            raise ValueError(f"head_size must be from 1 to 256, got {head_size}")
        if dtype not in _CACHE_DTYPES:
            raise ValueError(f"dtype must be one of {_CACHE_DTYPES}, got {dtype}")
        self.num_sequences = num_sequences
        if max_seq_len is None:
            max_seq_len = min(num_blocks * block_size, _LONGEST)
        self.max_seq_len = _integer("max_seq_len", max_seq_len)
        watermark = _integer("watermark", watermark)
        self.blocks = BlockManager(num_blocks, block_size, watermark, self.max_seq_len)
        self.max_blocks = self.blocks.blocks_for(self.max_seq_len)
        self.device = torch.device(device)
        shape = (num_blocks, 2, block_size, num_heads, head_size)
        self.caches = [self._zeros(*shape, dtype=dtype) for _ in range(num_layers)]
        if self.device.type == "cuda":
            for cache in self.caches:
                torch._dynamo.mark_static_address(cache)
        self._rows: dict[int, int] = {}  # of each sequence
        self._free_rows = set(range(num_sequences))
        self._block_table = self._zeros(num_sequences, self.max_blocks, dtype=torch.int32)
        self._seq_lens = self._zeros(num_sequences, dtype=torch.int32)
        self._stale = False  # the two tensors above lag behind
        self._block_pairs = self._zeros(num_sequences, 2, dtype=torch.int64)
        self._step_tensors: StepTensors | None = None
        self._swapped: dict[int, swap.Swapped] = {}

    @torch.inference_mode(False)  # what inference mode makes can be written in inference mode alone
    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def kv_cache(self) -> Tensor:
        """The first layer's cache as ``[num_blocks, block_size, 2, num_heads, head_size]``.

        A view: ``manager.kv_cache[block, :n, 0] = key`` and ``[block, :n, 1] = value`` write what
        the operators read.
        """
        return self.caches[0].transpose(1, 2)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds and no pin: all that can be taken.

        ``blocks.num_free_blocks`` leaves out those with a cached prefix, which are taken, the least
        recently used first, when no other is free.
        """
        return self.blocks.num_free_blocks + self.blocks.num_evictable_blocks

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
        sequence, and what lies past the last block of one, mean nothing.
        """
        self._refresh()
        return self._block_table

    @property
    def seq_lens(self) -> Tensor:
        """int32 ``[num_sequences]``, always the same tensor; 0 in rows without a sequence."""
        self._refresh()
        return self._seq_lens

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether there are blocks for a new sequence of ``num_tokens`` tokens.

        Or for one that was preempted or swapped out, which has kept its row. A new one needs a row
        as well: ``len(manager.rows) < manager.num_sequences``.
        """
        return self.blocks.can_allocate(_integer("num_tokens", num_tokens))

    def add_sequence(self, seq_id: int, seq_len: int) -> None:
        """Add a sequence and reserve blocks for ``seq_len`` tokens, which may be 0.

        The caller writes their keys and values.
        """
        seq_id, seq_len = _integer("seq_id", seq_id), _integer("seq_len", seq_len)
        self._require_row()
        self.blocks.allocate(seq_id, seq_len)
        self._give_row(seq_id)

    def append(self, seq_ids: int | Iterable[int], num_tokens: int | Iterable[int] = 1) -> None:
        """Grow one sequence, or each of several, by ``num_tokens`` tokens or by its own number.

        Blocks that are shared and about to be written are copied, in every layer.
        """
        ids = self._here(seq_ids)
        self._copy(self.blocks.append(ids, _integers("num_tokens", num_tokens)))

    def reserve(self, seq_ids: int | Iterable[int], num_tokens: int) -> None:
        """Hold the blocks of the next ``num_tokens`` tokens of each sequence; lengths stay.

        ``batch`` and ``block_table`` list them, so that a loop on the device may write so many
        tokens before the host appends them.
        """
        ids = self._here(seq_ids)
        self._copy(self.blocks.reserve(ids, _integer("num_tokens", num_tokens)))

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens and give up the blocks behind them."""
        (seq_id,) = self._here(_integer("seq_id", seq_id))
        self.blocks.truncate(seq_id, _integer("num_tokens", num_tokens))
        self._stale = True

    def share(self, seq_id: int, tokens: Integers | Tensor, salt: int = 0) -> int:
        """Begin an empty sequence with the cached blocks of its tokens; see ``blocks.share``."""
        (seq_id,) = self._here(_integer("seq_id", seq_id))
        tokens = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        length = self.blocks.share(seq_id, tokens, _integer("salt", salt))
        self._stale = True
        return length

    def preempt(self, seq_id: int) -> int:
        """Give up the blocks of a sequence, which stays, empty; returns the length it had.

        Its keys and values have to be computed again, from where ``share`` ends.
        """
        (seq_id,) = self._here(_integer("seq_id", seq_id))
        length = self.blocks.preempt(seq_id)
        self._stale = True
        return length

    def swap_out(self, seq_id: int) -> None:
        """Move the keys and values of a sequence to host memory, and give up its blocks.

        Until ``swap_in`` the sequence can only be freed. Blocks that it shared are copied too, and
        are its own afterwards. On the device this takes as much memory as the sequence has in one
        layer. The copies run on the current stream: what follows there waits for them, the host
        does not.
        """
        (seq_id,) = self._here(_integer("seq_id", seq_id))
        length = self.blocks.length(seq_id)
        blocks = self.blocks.blocks(seq_id)[: self.blocks.blocks_for(length)]
        self._swapped[seq_id] = swap.save(self.caches, blocks, length)
        self.blocks.preempt(seq_id)
        self._stale = True

    def swap_in(self, seq_id: int) -> None:
        """Take blocks for a sequence that was swapped out, and bring its keys and values back."""
        seq_id = _integer("seq_id", seq_id)
        swapped = self._swapped.get(seq_id)
        if swapped is None:
            raise ValueError(f"seq_id must be of a sequence that was swapped out, got {seq_id}")
        if swapped.seq_len > 0:
            self.blocks.append([seq_id], swapped.seq_len)
            try:
                swap.load(swapped, self.caches, self.blocks.blocks(seq_id))
            except BaseException:
                self.blocks.preempt(seq_id)  # still swapped out, and to be tried again
                raise
        del self._swapped[seq_id]
        self._stale = True

    def fork(self, parent_id: int, child_id: int) -> None:
        """Add a sequence with the tokens of another; their blocks are shared until written."""
        (parent_id,) = self._here(_integer("parent_id", parent_id))
        child_id = _integer("child_id", child_id)
        self._require_row()
        self.blocks.fork(parent_id, child_id)
        self._give_row(child_id)

    def free_sequence(self, seq_ids: int | Iterable[int]) -> None:
        """End one sequence, or several, and give up their blocks and rows."""
        ids = _list("seq_ids", seq_ids)
        if len(self._rows.keys() & ids) < len(ids):
            raise ValueError(f"seq_ids must be of sequences that were added, each once, got {ids}")
        for seq_id in ids:
            self.blocks.free(seq_id)
            self._free_rows.add(self._rows.pop(seq_id))
            self._swapped.pop(seq_id, None)
        self._stale = True

    def step(self, seq_ids: int | Iterable[int], *, pad_to: int = 0) -> Batch:
        """Append one token to each sequence and describe the decode step that writes it.

        Only what has changed is written, on the host, and sent in one asynchronous copy.

        Args:
            seq_ids: n sequences, in the order of the batch.
            pad_to: at least so many rows, as in ``batch``; ``num_sequences`` at the most.

        Returns:
            Tensors whose memory the next ``step`` writes again, always in the same place.
        """
        ids = self._here(seq_ids)
        rows = max(len(ids), _integer("pad_to", pad_to))
        if rows > self.num_sequences:
            raise ValueError(
                f"pad_to must be at most num_sequences={self.num_sequences}, got {rows}"
            )
        if self._step_tensors is None:
            self._step_tensors = StepTensors(self.num_sequences, self.max_blocks, self.device)
        self._copy(self._step_tensors.step(self.blocks, ids, rows))
        views = self._step_tensors.on_device
        return Batch(
            block_table=views.block_table[:rows],
            seq_lens=views.seq_lens[:rows],
            query_start_loc=None,
            slot_mapping=views.slot_mapping[:rows],
            positions=views.positions[:rows],
        )

    def slot_mapping(
        self, seq_ids: int | Iterable[int], num_new_tokens: int | Iterable[int] = 1
    ) -> Tensor:
        """Slots of the last tokens of each sequence, end to end, int64 ``[t]``."""
        return self.batch(seq_ids, num_new_tokens).slot_mapping

    def batch(
        self,
        seq_ids: int | Iterable[int],
        num_new_tokens: int | Iterable[int] = 1,
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
            ``None``; several numbers never do, so that a loop meets one kind of batch. Of the
            block table no more is sent than the longest of the sequences has blocks.
        """
        ids = self._here(seq_ids)
        numbers = _integers("num_new_tokens", num_new_tokens)
        decode = numbers == 1
        counts = [numbers] * len(ids) if isinstance(numbers, int) else numbers
        table, lens, starts, slots, positions = self.blocks.batch(ids, counts, self.max_blocks)
        padding = max(_integer("pad_to", pad_to) - len(ids), 0)
        num_seqs, num_tokens = len(ids) + padding, sum(counts) + padding
        block_table = torch.empty(num_seqs, self.max_blocks, dtype=torch.int32, device=self.device)
        if table:
            width = len(table) // (4 * len(ids))
            sent = self._tensor(table, torch.int32, (len(ids), width))
            block_table[: len(ids), :width] = sent
        lens.extend(bytes(4 * padding))
        starts.extend(array("i", range(sum(counts) + 1, num_tokens + 1)).tobytes())
        slots.extend(array("q", [-1] * padding).tobytes())
        positions.extend(bytes(8 * padding))
        return Batch(
            block_table=block_table,
            seq_lens=self._tensor(lens, torch.int32, (num_seqs,)),
            query_start_loc=None if decode else self._tensor(starts, torch.int32, (num_seqs + 1,)),
            slot_mapping=self._tensor(slots, torch.int64, (num_tokens,)),
            positions=self._tensor(positions, torch.int64, (num_tokens,)),
        )

    def _tensor(self, memory: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if not memory:
            return torch.empty(shape, dtype=dtype, device=self.device)
        # Resized in place, not viewed: a compiled step would guard on the size of a view's base.
        return send(torch.frombuffer(memory, dtype=dtype).resize_(shape), self.device)

    def _refresh(self) -> None:
        """Bring the persistent tensors up to what the block manager says."""
        if not self._stale:
            return
        here = {seq_id: row for seq_id, row in self._rows.items() if seq_id not in self._swapped}
        rows = send(torch.tensor(list(here.values()), dtype=torch.int64), self.device)
        batch = self.batch(here, 0)
        with torch.no_grad():
            self._seq_lens.zero_()
            self._seq_lens[rows] = batch.seq_lens
            self._block_table[rows] = batch.block_table
        self._stale = False

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in every layer: sequences have grown."""
        self._stale = True
        if not pairs:
            return
        # Into memory that is there: now that the sequences have grown nothing may fail any more.
        block_pairs = self._block_pairs[: len(pairs)]
        host = torch.tensor(pairs, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        with torch.no_grad():
            block_pairs.copy_(host, non_blocking=True)
            for cache in self.caches:
                ops.copy_blocks(cache, block_pairs)

    def _here(self, seq_ids: int | Iterable[int]) -> list[int]:
        """The ids as a list, none of them of a sequence that is swapped out."""
        ids = _list("seq_ids", seq_ids)
        if self._swapped and not self._swapped.keys().isdisjoint(ids):
            away = next(seq_id for seq_id in ids if seq_id in self._swapped)
            raise ValueError(f"seq_id must be of a sequence that is not swapped out, got {away}")
        return ids

    def _require_row(self) -> None:
        if not self._free_rows:
            raise ValueError(f"all num_sequences={self.num_sequences} sequences are in use")

    def _give_row(self, seq_id: int) -> None:
        row = seq_id if seq_id in self._free_rows else min(self._free_rows)
        self._free_rows.remove(row)
        self._rows[seq_id] = row
        self._stale = True
