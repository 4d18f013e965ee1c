"""BlockManager against a simple model, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from paged_ops import BlockManager, OutOfBlocks

IDS = st.integers(0, 6)


class Model:
    """The same in Python: a sequence is a list of blocks, and who holds a block is counted anew."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.lengths: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}

    def holders(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.blocks.values())

    def num_free(self) -> int:
        return self.num_blocks - len({block for held in self.blocks.values() for block in held})

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def needed_to_append(self, seq_ids: list[int], num_tokens: int) -> int:
        """Counts by playing it through: each writer leaves a shared block while others hold it."""
        needed, left = 0, {}
        for seq_id in seq_ids:
            length, held = self.lengths[seq_id], self.blocks[seq_id]
            needed += self.blocks_for(length + num_tokens) - len(held)
            if length % self.block_size and self.holders(held[-1]) - left.get(held[-1], 0) > 1:
                left[held[-1]] = left.get(held[-1], 0) + 1
                needed += 1
        return needed


class BlockManagerMachine(RuleBasedStateMachine):
    """Any operations in any order."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.model = Model(num_blocks, block_size)

    def snapshot(self) -> tuple:
        held = {seq_id: self.manager.blocks(seq_id) for seq_id in self.model.blocks}
        return held, self.manager.num_free_blocks, self.manager.num_sequences

    def refused(self, error: type[Exception], call) -> None:
        before = self.snapshot()
        with pytest.raises(error) as raised:
            call()
        assert self.snapshot() == before
        if error is OutOfBlocks:
            assert raised.value.free == self.model.num_free()
            assert raised.value.needed > raised.value.free

    @rule(seq_id=IDS, num_tokens=st.integers(-1, 20))
    def allocate(self, seq_id: int, num_tokens: int) -> None:
        def call() -> None:
            self.manager.allocate(seq_id, num_tokens)

        if seq_id in self.model.lengths or num_tokens < 0:
            return self.refused(ValueError, call)
        if self.model.blocks_for(num_tokens) > self.model.num_free():
            return self.refused(OutOfBlocks, call)
        call()
        blocks = self.manager.blocks(seq_id)
        assert all(self.model.holders(block) == 0 for block in blocks)
        self.model.lengths[seq_id], self.model.blocks[seq_id] = num_tokens, blocks
        return None

    @rule(seq_ids=st.lists(IDS, max_size=4), num_tokens=st.integers(0, 7))
    def append(self, seq_ids: list[int], num_tokens: int) -> None:
        def call() -> list[tuple[int, int]]:
            return self.manager.append(seq_ids, num_tokens)

        unknown = any(seq_id not in self.model.lengths for seq_id in seq_ids)
        if unknown or len(set(seq_ids)) < len(seq_ids) or num_tokens < 1:
            self.refused(ValueError, call)
            return
        if self.model.needed_to_append(seq_ids, num_tokens) > self.model.num_free():
            self.refused(OutOfBlocks, call)
            return
        copies = dict(map(reversed, call()))  # destination -> source
        for seq_id in seq_ids:
            old, new = self.model.blocks[seq_id], self.manager.blocks(seq_id)
            for i, block in enumerate(old):
                assert new[i] == block or copies.pop(new[i]) == block
            self.model.blocks[seq_id] = new
            self.model.lengths[seq_id] += num_tokens
        assert not copies, "a copy that no sequence needs"
        for seq_id in seq_ids:  # what was written is held by its sequence alone
            first = (self.model.lengths[seq_id] - num_tokens) // self.model.block_size
            for block in self.model.blocks[seq_id][first:]:
                assert self.model.holders(block) == 1

    @rule(parent=IDS, child=IDS)
    def fork(self, parent: int, child: int) -> None:
        if parent not in self.model.lengths or child in self.model.lengths:
            self.refused(ValueError, lambda: self.manager.fork(parent, child))
            return
        self.manager.fork(parent, child)
        self.model.lengths[child] = self.model.lengths[parent]
        self.model.blocks[child] = list(self.model.blocks[parent])

    @rule(seq_id=IDS)
    def free(self, seq_id: int) -> None:
        if seq_id not in self.model.lengths:
            self.refused(ValueError, lambda: self.manager.free(seq_id))
            return
        self.manager.free(seq_id)
        del self.model.lengths[seq_id], self.model.blocks[seq_id]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        assert self.manager.num_free_blocks == self.model.num_free()
        assert self.manager.num_sequences == len(self.model.lengths)
        for seq_id, length in self.model.lengths.items():
            assert self.manager.length(seq_id) == length
            assert self.manager.blocks(seq_id) == self.model.blocks[seq_id]
            assert len(self.model.blocks[seq_id]) == self.model.blocks_for(length)
        for block in range(self.model.num_blocks):
            assert self.manager.ref_count(block) == self.model.holders(block)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_a_fork_shares_until_it_is_written():
    manager = BlockManager(num_blocks=4, block_size=4)
    manager.allocate(0, 6)
    manager.fork(0, 1)
    assert manager.blocks(0) == manager.blocks(1) == [0, 1]
    assert manager.append([1]) == [(1, 2)]
    assert manager.blocks(1) == [0, 2]
    assert manager.append([0]) == [], "its last block is its own again"
    assert manager.num_free_blocks == 1


def test_a_fork_at_a_block_edge_copies_nothing():
    manager = BlockManager(num_blocks=4, block_size=4)
    manager.allocate(0, 4)
    manager.fork(0, 1)
    assert manager.append([0, 1]) == []
    assert manager.blocks(0)[0] == manager.blocks(1)[0]
    assert manager.blocks(0)[1] != manager.blocks(1)[1]


def test_out_of_blocks_says_how_many():
    manager = BlockManager(num_blocks=3, block_size=2)
    manager.allocate(0, 3)
    with pytest.raises(OutOfBlocks, match="4 needed, 1 free") as error:
        manager.allocate(1, 7)
    assert (error.value.needed, error.value.free) == (4, 1)
    assert isinstance(error.value, RuntimeError)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockManager(0, 4), "num_blocks must be at least 1, got 0"),
        (lambda: BlockManager(4, 0), "block_size must be at least 1, got 0"),
        (lambda: BlockManager(2**31, 1), "num_blocks must be at most 2147483647"),
        (
            lambda: BlockManager(4, 4).length(3),
            "seq_id must be of a sequence that was added, got 3",
        ),
        (lambda: BlockManager(4, 4).blocks(3), "got 3"),
        (lambda: BlockManager(4, 4).ref_count(4), "block must be from 0 to 3, got 4"),
        (lambda: BlockManager(4, 4).step([1], [1], 4), "seq_id must be of a sequence"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_step_refuses_what_does_not_fit():
    manager = BlockManager(8, 2)
    manager.allocate(0, 5)
    for counts, width, message in (
        ([], 4, "one entry for each of the 1 sequences, got 0"),
        ([6], 4, "from 0 to the length 5 of sequence 0, got 6"),
        ([-1], 4, "got -1"),
        ([1], 2, "max_blocks must hold the 3 blocks of sequence 0, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            manager.step([0], counts, width)


def test_freed_blocks_serve_again():
    manager = BlockManager(4, 2)
    for _ in range(100):
        manager.allocate(0, 8)
        manager.free(0)
    manager.check()
    assert manager.num_free_blocks == 4
