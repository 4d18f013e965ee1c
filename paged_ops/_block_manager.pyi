from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

Integers = Sequence[int] | Buffer
"""A sequence of int, or a contiguous array of int64 or int32.

Tokens in an array of int64 are read where they lie, without the GIL: change them when the call has
returned.
"""

class OutOfBlocks(RuntimeError):
    """Too few blocks for what was asked; nothing has changed."""

    needed: int
    """Blocks that the operation needs, the watermark included where it applies."""
    free: int
    """Blocks that are free."""
    evictable: int
    """Blocks that the prefix cache alone keeps, and gives up when none is free."""

class StepBuffers:
    """The memory that ``BlockManager.step`` writes, and what it has written there.

    To be used by one thread at a time, and changed by nobody else.
    """

    def __init__(
        self, block_table: Buffer, seq_lens: Buffer, slot_mapping: Buffer, positions: Buffer
    ) -> None:
        """Keep writable, contiguous arrays: numpy's, or ``tensor.numpy()`` of (pinned) tensors.

        Args:
            block_table: int32 ``[rows, max_blocks]``.
            seq_lens: int32 ``[rows]``.
            slot_mapping: int64 ``[rows]``.
            positions: int64 ``[rows]``.

        Raises:
            ValueError: an array of another kind.
        """

class BlockManager:
    """The blocks of a paged KV cache and the sequences that hold them.

    Blocks are counted by reference; a fork shares the blocks of its parent, and what would be
    written while shared is replaced first (copy-on-write). A block is held, free, or evictable: the
    prefix cache alone keeps it, and it is taken, the least recently used first, when none is free.

    Every operation is all or nothing: one that raises has changed nothing. Threads may share a
    manager: each method takes its lock, and releases the GIL meanwhile.

    Raises, wherever they apply:
        ValueError: a sequence that is unknown, known already or named twice, or a number that is
            out of range.
        OutOfBlocks: too few free and evictable blocks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, watermark: int = 0, max_seq_len: int = 2147483647
    ) -> None:
        """Manage ``num_blocks`` blocks of ``block_size`` tokens each, all of them free.

        Args:
            num_blocks: from 1 to 2147483646.
            block_size: from 1 to 1048576.
            watermark: how many blocks ``allocate`` leaves for the sequences that hold some, so that
                they can grow; while none does it leaves none.
            max_seq_len: tokens that the longest sequence may have.
        """

    def allocate(self, seq_id: int, num_tokens: int) -> None:
        """Add a sequence of ``num_tokens`` tokens, which may be 0."""

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether ``allocate`` would find enough blocks."""

    def append(self, seq_ids: Integers, num_tokens: int | Integers = 1) -> list[tuple[int, int]]:
        """Grow each sequence by ``num_tokens`` tokens, or by a number of its own, at least 1.

        Returns:
            (source, destination) block ids; each pair has to be copied in every layer's cache
            before the new tokens are written.
        """

    def reserve(self, seq_ids: Integers, num_tokens: int) -> list[tuple[int, int]]:
        """Hold the blocks of the next ``num_tokens`` tokens of each sequence; lengths stay.

        A loop on the device may then write so many tokens, and ``append`` follows when it is done.
        What is reserved stays so until it is appended or truncated, or the sequence ends.

        Returns:
            As ``append``.
        """

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens, and give up the blocks behind, reserved ones too.

        Rejected speculative tokens leave a sequence this way.
        """

    def fork(self, parent_id: int, child_id: int) -> None:
        """Add a sequence with the tokens, and for now the blocks, of another.

        Reserved blocks stay with the parent alone.
        """

    def preempt(self, seq_id: int) -> int:
        """Give up the blocks of a sequence, which stays, empty; returns the length it had.

        It comes back by ``share``, which finds what the prefix cache still has, and ``append``.
        """

    def free(self, seq_id: int) -> None:
        """End a sequence; blocks that nobody else holds become free, or evictable if cached."""

    def lookup(self, tokens: Integers, salt: int = 0) -> int:
        """How many of the first tokens are cached: a multiple of the block size.

        Tokens with another salt (of a tenant, an adapter), at least 0, are others. A hit compares
        the tokens themselves, not only their hashes.
        """

    def share(self, seq_id: int, tokens: Integers, salt: int = 0) -> int:
        """Give an empty sequence the cached blocks that begin its tokens; returns its new length.

        Leave the last token of a prompt out: it has to be computed in any case, for its logits.
        """

    def publish(self, seq_id: int, tokens: Integers, salt: int = 0) -> int:
        """Enter the full blocks of a sequence into the prefix cache.

        What an equal prefix has entered already is passed over, and so is what this sequence has;
        but if a prefix that was passed over has been evicted since, it is entered anew.

        Args:
            seq_id: the sequence.
            tokens: its first tokens, all of which have been written to the KV cache.
            salt: the same for each call of a sequence, and the one it was shared with.

        Returns:
            How many of its first tokens are published now, those of earlier calls included; but
            where a prefix is entered anew, of ``tokens`` alone.
        """

    def pin(self, tokens: Integers, salt: int = 0) -> int:
        """Keep the full blocks of ``tokens``, all of them cached, from eviction.

        Pins are counted. Returns how many tokens the blocks hold.
        """

    def unpin(self, tokens: Integers, salt: int = 0) -> int:
        """Undo one ``pin`` of the same tokens."""

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix: after new weights the keys and values in it are wrong.

        Blocks that only the cache or a pin kept are free again. Pins end too: they are not to be
        undone, but made again once their prefixes are published again. Sequences keep their blocks
        and would publish them again: after new weights, end or preempt them, and end those that are
        swapped out.
        """

    def step(self, seq_ids: Integers, buffers: StepBuffers) -> list[tuple[int, int]]:
        """Append one token to each sequence, and bring row i of the buffers up to ``seq_ids[i]``.

        A row that showed the same sequence before has only its changes written. Rows past the last
        sequence have length 0, slot -1 and position 0: the operators skip them.

        Returns:
            As ``append``.
        """

    def batch(
        self, seq_ids: Integers, num_new_tokens: Integers, max_blocks: int
    ) -> tuple[bytearray, bytearray, bytearray, bytearray, bytearray]:
        """Describe a step in which the last ``num_new_tokens[i]`` tokens of ``seq_ids[i]`` are new.

        Args:
            seq_ids: n sequences.
            num_new_tokens: for each, t in all.
            max_blocks: columns that there is room for. Blocks past it that are reserved are left
                out.

        Returns:
            The memory of ``block_table`` int32 ``[n, width]``, ``seq_lens`` int32 ``[n]``,
            ``query_start_loc`` int32 ``[n + 1]``, ``slot_mapping`` int64 ``[t]`` and ``positions``
            int64 ``[t]``. The width is the most blocks that one of the sequences lists.
        """

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""

    def blocks(self, seq_id: int) -> list[int]:
        """Block ids of a sequence, in the order of its tokens; reserved ones are the last."""

    def ref_count(self, block: int) -> int:
        """How many sequences and pins hold a block."""

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill or begin to fill."""

    def state(self) -> dict[str, Any]:
        """Everything for people to read: sizes, counts of blocks, sequences, cache statistics.

        ``state()["prefix"]`` counts what ``share`` was asked for and found, in tokens, and the
        blocks published and evicted; ``state()["sequences"]`` has the length and the blocks of
        each.
        """

    def check(self) -> None:
        """Verify every invariant; RuntimeError where one is broken."""

    def __contains__(self, seq_id: int) -> bool: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def watermark(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_evictable_blocks(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
