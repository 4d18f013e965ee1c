from collections.abc import Sequence

class OutOfBlocks(RuntimeError):
    """Too few free blocks for what was asked; nothing has changed."""

    needed: int
    """Blocks that the operation needs."""
    free: int
    """Blocks that are free."""

class BlockManager:
    """The blocks of a paged KV cache and the sequences that hold them.

    Blocks are counted by reference; a fork shares the blocks of its parent, and what would be
    written while shared is replaced first (copy-on-write). Every operation is all or nothing: one
    that raises has changed nothing. Not thread-safe.

    Raises, wherever they apply:
        ValueError: a sequence that is unknown, known already or named twice, or a number that is
            out of range.
        OutOfBlocks: too few free blocks.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Manage ``num_blocks`` blocks of ``block_size`` tokens each, all of them free."""

    def allocate(self, seq_id: int, num_tokens: int) -> None:
        """Add a sequence of ``num_tokens`` tokens, which may be 0."""

    def append(self, seq_ids: Sequence[int], num_tokens: int = 1) -> list[tuple[int, int]]:
        """Grow each sequence by ``num_tokens`` tokens.

        Returns:
            (source, destination) block ids; each pair has to be copied in every layer's cache
            before the new tokens are written.
        """

    def fork(self, parent_id: int, child_id: int) -> None:
        """Add a sequence with the tokens, and for now the blocks, of another."""

    def free(self, seq_id: int) -> None:
        """End a sequence; the blocks that no other sequence holds become free."""

    def step(
        self, seq_ids: Sequence[int], num_new_tokens: Sequence[int], max_blocks: int
    ) -> tuple[bytearray, bytearray, bytearray, bytearray, bytearray]:
        """Describe a step in which the last ``num_new_tokens[i]`` tokens of ``seq_ids[i]`` are new.

        Returns:
            The memory of ``block_table`` int32 ``[n, max_blocks]``, ``seq_lens`` int32 ``[n]``,
            ``query_start_loc`` int32 ``[n + 1]``, ``slot_mapping`` int64 ``[t]`` and ``positions``
            int64 ``[t]``, for n sequences and t new tokens in all.
        """

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence."""

    def blocks(self, seq_id: int) -> list[int]:
        """Block ids of a sequence, in the order of its tokens."""

    def ref_count(self, block: int) -> int:
        """How many sequences hold a block."""

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill or begin to fill."""

    def check(self) -> None:
        """Verify every invariant; RuntimeError where one is broken."""

    def __contains__(self, seq_id: int) -> bool: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
