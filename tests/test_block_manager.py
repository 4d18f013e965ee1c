"""BlockManager: each operation by example, and what it refuses."""

from __future__ import annotations

import mmap
import re
import reprlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from paged_ops import BlockManager, OutOfBlocks, StepBuffers


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


def mapped_bytes() -> int:
    return mmap.PAGESIZE * int(Path("/proc/self/statm").read_text().split()[0])


def test_out_of_blocks_reserves_no_memory():
    manager = BlockManager(num_blocks=8, block_size=1)
    manager.allocate(0, 0)
    before = mapped_bytes()
    for call in (manager.append, manager.reserve):
        with pytest.raises(OutOfBlocks, match="2147483647 needed, 8 free"):
            call([0], 2**31 - 1)
    assert mapped_bytes() - before < 2**30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockManager(0, 4), "num_blocks must be at least 1, got 0"),
        (lambda: BlockManager(4, 0), "block_size must be at least 1, got 0"),
        (lambda: BlockManager(2**31, 1), "num_blocks must be at most 2147483646"),
        (
            lambda: BlockManager(4, 4).length(3),
            "seq_id must be of a sequence that was added, got 3",
        ),
        (lambda: BlockManager(4, 4).blocks(3), "that was added, got 3"),
        (lambda: BlockManager(4, 4).ref_count(4), "block must be from 0 to 3, got 4"),
        (lambda: BlockManager(4, 4).batch([1], [1], 4), "seq_id must be of a sequence"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_batch_refuses_what_does_not_fit():
    manager = BlockManager(8, 2)
    manager.allocate(0, 5)
    for counts, width, message in (
        ([], 4, "one entry for each of the 1 sequences, got 0"),
        ([6], 4, "from 0 to the length 5 of sequence 0, got 6"),
        ([-1], 4, "the length 5 of sequence 0, got -1"),
        ([1], 2, "max_blocks must hold the 3 blocks of sequence 0, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            manager.batch([0], counts, width)


def test_batch_is_as_wide_as_its_longest_sequence():
    manager = BlockManager(8, 2)
    manager.allocate(0, 5)
    manager.allocate(1, 1)
    table = np.frombuffer(manager.batch([1, 0], [0, 0], 8)[0], np.int32).reshape(2, -1)
    assert table.tolist() == [[*manager.blocks(1), 0, 0], manager.blocks(0)]
    manager.reserve([0], 7)
    assert len(manager.batch([0], [0], 4)[0]) == 4 * 4, "what is reserved may be cut off"
    assert len(manager.batch([], [], 4)[0]) == 0


def test_freed_blocks_serve_again():
    manager = BlockManager(4, 2)
    for _ in range(100):
        manager.allocate(0, 8)
        manager.free(0)
    manager.check()
    assert manager.num_free_blocks == 4


def test_reserved_blocks_serve_what_is_appended():
    manager = BlockManager(4, 2)
    manager.allocate(0, 1)
    assert manager.reserve([0], 4) == []
    assert (manager.length(0), manager.num_free_blocks) == (1, 1)
    held = manager.blocks(0)
    for _ in range(5):
        manager.append([0])
    assert manager.blocks(0) == held
    manager.truncate(0, 6)
    manager.reserve([0], 2)
    manager.truncate(0, 6)
    assert manager.num_free_blocks == 1, "a reservation ends with a truncation"


def test_reserving_takes_a_shared_block_over():
    manager = BlockManager(4, 4)
    manager.allocate(0, 2)
    manager.fork(0, 1)
    assert manager.reserve([0], 1) == [(0, 1)]
    assert manager.append([0]) == []


def test_sequences_grow_by_different_numbers():
    manager = BlockManager(8, 2)
    for seq_id in range(3):
        manager.allocate(seq_id, 1)
    assert manager.append([2, 0], np.array([4, 1])) == []
    assert [manager.length(seq_id) for seq_id in range(3)] == [2, 1, 5]


def test_watermark_is_left_for_those_that_are_there():
    manager = BlockManager(4, 1, watermark=2)
    assert manager.can_allocate(4)
    manager.allocate(0, 1)
    assert manager.can_allocate(1)
    assert not manager.can_allocate(2)
    with pytest.raises(OutOfBlocks) as error:
        manager.allocate(1, 2)
    assert (error.value.needed, error.value.free, error.value.evictable) == (4, 3, 0)
    manager.append([0], 3)


def test_watermark_is_left_for_those_that_share_what_is_pinned():
    manager = BlockManager(4, 2, watermark=1)
    manager.allocate(0, 4)
    manager.publish(0, [1, 2, 3, 4])
    manager.pin([1, 2, 3, 4])
    manager.free(0)
    assert manager.can_allocate(4), "a pin alone does not grow"
    manager.allocate(1, 0)
    manager.share(1, [1, 2, 3, 4])
    assert not manager.can_allocate(4)
    with pytest.raises(OutOfBlocks, match="3 needed, 2 free"):
        manager.allocate(2, 4)
    manager.append([1], 1)


def test_prefix_is_shared_and_outlives_its_sequence():
    manager = BlockManager(8, 4)
    tokens = list(range(11))
    manager.allocate(0, 11)
    assert manager.publish(0, tokens) == 8
    held = manager.blocks(0)
    manager.free(0)
    assert (manager.num_free_blocks, manager.num_evictable_blocks) == (6, 2)
    assert manager.lookup(tokens) == 8
    assert manager.lookup(tokens, salt=1) == 0
    assert manager.lookup([9, *tokens[1:]]) == 0
    manager.allocate(1, 0)
    assert manager.share(1, np.array(tokens)) == 8
    assert manager.blocks(1) == held[:2]
    assert manager.num_evictable_blocks == 0


def test_least_recently_used_prefix_is_evicted_from_its_end():
    manager = BlockManager(4, 2)
    for seq_id, tokens in enumerate(([1, 2, 3, 4], [5, 6, 7, 8])):
        manager.allocate(seq_id, 4)
        manager.publish(seq_id, tokens)
    manager.free(1)
    manager.free(0)
    manager.allocate(2, 1)
    assert manager.lookup([5, 6, 7, 8]) == 2
    manager.append([2], 3)
    assert manager.lookup([5, 6, 7, 8]) == 0
    assert manager.lookup([1, 2, 3, 4]) == 4
    assert manager.state()["prefix"]["blocks_evicted"] == 2
    with pytest.raises(OutOfBlocks, match="3 needed, 0 free and 2 evictable"):
        manager.append([2], 5)


def test_pinned_prefix_is_not_evicted():
    manager = BlockManager(4, 2)
    manager.allocate(0, 4)
    manager.publish(0, [1, 2, 3, 4])
    assert manager.pin([1, 2, 3, 4, 5]) == 4
    manager.free(0)
    with pytest.raises(OutOfBlocks):
        manager.allocate(1, 6)
    assert manager.unpin([1, 2, 3, 4]) == 4
    manager.allocate(1, 6)
    assert manager.lookup([1, 2, 3, 4]) == 2


def test_a_pin_is_undone_as_it_was_made():
    """Unpinning its beginning alone would leave an end that nobody can find."""
    manager = BlockManager(4, 2)
    manager.allocate(0, 4)
    manager.publish(0, [1, 2, 3, 4])
    manager.pin([1, 2, 3, 4])
    with pytest.raises(ValueError, match="those of a pin, no fewer and no more"):
        manager.unpin([1, 2])
    manager.pin([1, 2])
    assert manager.unpin([1, 2]) == 2
    assert manager.unpin([1, 2, 3, 4]) == 4
    assert manager.state()["num_pinned_blocks"] == 0


def test_a_reset_forgets_every_prefix():
    manager = BlockManager(8, 2)
    for seq_id, tokens in enumerate(([1, 2, 3, 4], [5, 6, 7, 8], [9, 9])):
        manager.allocate(seq_id, len(tokens))
        manager.publish(seq_id, tokens, salt=seq_id)
    for _ in range(2):
        manager.pin([5, 6], salt=1)
    manager.free(1)
    manager.free(2)
    held = manager.blocks(0)
    manager.reset_prefix_cache()
    manager.check()
    state = manager.state()
    assert (state["num_free_blocks"], state["num_evictable_blocks"]) == (6, 0)
    assert (state["num_cached_blocks"], state["num_pinned_blocks"]) == (0, 0)
    assert state["sequences"] == {0: {"length": 4, "published_blocks": 0, "blocks": held}}
    assert [manager.lookup(t, s) for t, s in (([1, 2], 0), ([5, 6], 1), ([9, 9], 2))] == [0] * 3
    with pytest.raises(ValueError, match="cached in all of their 1 full blocks, got 0"):
        manager.unpin([5, 6], salt=1)
    assert manager.publish(0, [1, 2, 3, 4], salt=7) == 4, "it may even begin with another salt"
    assert manager.lookup([1, 2, 3, 4], salt=7) == 4


def test_colliding_prefixes_are_told_apart():
    """The hash takes tokens for 32-bit numbers: two in one word."""
    first, second = [2**32, 0], [0, 1]
    manager = BlockManager(4, 2)
    manager.allocate(0, 2)
    manager.publish(0, first)
    assert manager.lookup(first) == 2
    assert manager.lookup(second) == 0
    manager.allocate(1, 2)
    manager.publish(1, second)
    assert manager.lookup(second) == 2
    assert manager.lookup(first) == 0, "two prefixes of one hash have one place"
    manager.pin(second)
    manager.allocate(2, 2)
    assert manager.publish(2, first) == 0
    assert manager.lookup(second) == 2
    manager.check()


def test_what_follows_a_colliding_prefix_is_told_apart():
    manager = BlockManager(4, 2)
    manager.allocate(0, 4)
    manager.publish(0, [2**32, 0, 5, 6])
    manager.allocate(1, 2)
    manager.publish(1, [0, 1])
    assert manager.lookup([0, 1, 5, 6]) == 2


def test_prefixes_branch():
    """A block is followed by whichever was published after it, not by the latest alone."""
    manager = BlockManager(16, 2)
    branches = [[1, 2, 3, last, 9, last] for last in range(4)]
    for seq_id, tokens in enumerate(branches):
        manager.allocate(seq_id, 0)
        shared = manager.share(seq_id, tokens)
        manager.append([seq_id], 6 - shared)
        manager.publish(seq_id, tokens)
    assert [manager.lookup(tokens) for tokens in branches] == [6] * 4
    manager.free(3)
    manager.allocate(4, 2 * 9)
    assert [manager.lookup(tokens) for tokens in branches] == [6, 6, 6, 2]
    manager.publish(4, [1, 2, *range(14)])
    assert manager.lookup(branches[3]) == 2


def test_prefix_after_another_than_it_was_published_after():
    """Equal tokens in two blocks: the second went on, and the first was evicted."""
    manager = BlockManager(3, 1)
    manager.allocate(0, 1)
    manager.publish(0, [7])
    manager.allocate(1, 2)
    assert manager.publish(1, [7, 8]) == 2
    manager.free(0)
    manager.append([1])
    assert manager.lookup([7, 8]) == 0
    manager.truncate(1, 2)
    manager.truncate(1, 0)
    manager.append([1], 2)
    assert manager.publish(1, [7, 8]) == 2
    assert manager.lookup([7, 8]) == 2
    manager.check()


@pytest.mark.parametrize("published", [4, 6], ids=["at its end", "before its end"])
def test_publishing_after_an_evicted_prefix_begins_anew(published):
    manager = BlockManager(9, 2)
    tokens = list(range(8))
    manager.allocate(0, 4)
    manager.publish(0, tokens[:4])
    manager.allocate(1, published)
    assert manager.publish(1, tokens[:published]) == published
    manager.free(0)
    manager.allocate(2, 2 * (9 - published // 2))
    manager.free(2)
    manager.append([1], 8 - published)
    assert manager.publish(1, tokens) == 8
    assert manager.lookup(tokens) == 8
    manager.check()


def test_writing_into_a_published_block_unpublishes_it():
    manager = BlockManager(4, 2)
    manager.allocate(0, 4)
    manager.publish(0, [1, 2, 3, 4])
    manager.truncate(0, 3)
    assert manager.lookup([1, 2, 3, 4]) == 4
    assert manager.append([0]) == []
    assert manager.lookup([1, 2, 3, 4]) == 2
    assert manager.publish(0, [1, 2, 3, 9]) == 4
    assert manager.lookup([1, 2, 3, 9]) == 4


def test_writing_into_a_pinned_block_copies_it():
    manager = BlockManager(4, 2)
    manager.allocate(0, 2)
    manager.publish(0, [1, 2])
    manager.pin([1, 2])
    manager.truncate(0, 1)
    assert manager.append([0]) == [(0, 1)]
    assert manager.lookup([1, 2]) == 2


def test_preempted_sequence_comes_back():
    manager = BlockManager(4, 2)
    manager.allocate(0, 5)
    manager.publish(0, [1, 2, 3, 4])
    assert manager.preempt(0) == 5
    assert (manager.length(0), manager.num_free_blocks, manager.num_evictable_blocks) == (0, 2, 2)
    assert manager.share(0, [1, 2, 3, 4]) == 4
    manager.append([0])
    assert manager.length(0) == 5


@pytest.fixture
def step_arrays():
    return {
        "block_table": np.full((4, 3), -7, dtype=np.int32),
        "seq_lens": np.full(4, -7, dtype=np.int32),
        "slot_mapping": np.full(4, -7),
        "positions": np.full(4, -7),
    }


def test_step_appends_and_describes(step_arrays):
    manager = BlockManager(8, 2)
    buffers = StepBuffers(**step_arrays)
    manager.allocate(5, 3)
    manager.allocate(6, 2)
    assert manager.step([6, 5], buffers) == []
    assert [manager.length(5), manager.length(6)] == [4, 3]
    assert step_arrays["seq_lens"].tolist() == [3, 4, 0, 0]
    assert step_arrays["positions"].tolist() == [2, 3, 0, 0]
    (_, last), (_, second) = manager.blocks(6), manager.blocks(5)
    assert step_arrays["slot_mapping"].tolist() == [2 * last, 2 * second + 1, -1, -1]
    assert step_arrays["block_table"][0].tolist() == [*manager.blocks(6), -7]
    assert step_arrays["block_table"][1].tolist() == [*manager.blocks(5), -7]


def test_step_writes_what_has_changed_alone(step_arrays):
    manager = BlockManager(12, 2)
    buffers = StepBuffers(**step_arrays)
    table = step_arrays["block_table"]
    manager.allocate(0, 2)
    manager.step([0], buffers)
    table[0, :2] = 99
    manager.step([0], buffers)
    assert table[0].tolist() == [99, 99, -7]
    manager.step([0], buffers)
    assert table[0].tolist() == [99, 99, manager.blocks(0)[2]]
    manager.fork(0, 1)
    assert len(manager.step([0], buffers)) == 1
    assert table[0].tolist() == manager.blocks(0), "a copied block makes the row anew"
    manager.truncate(0, 1)
    manager.allocate(2, 3)
    manager.step([2, 0], buffers)
    assert table[0, :2].tolist() == manager.blocks(2)
    assert table[1, :1].tolist() == manager.blocks(0)
    manager.free(2)
    manager.allocate(2, 3)
    manager.step([2], buffers)
    assert table[0, :2].tolist() == manager.blocks(2), "of the same name, and another sequence"
    assert step_arrays["seq_lens"].tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("block_table", np.zeros(4, dtype=np.int32)),
        ("block_table", np.zeros((4, 3), dtype=np.int64)),
        ("block_table", np.zeros((4, 6), dtype=np.int32)[:, ::2]),
        ("seq_lens", np.zeros(3, dtype=np.int32)),
        ("slot_mapping", np.zeros(4, dtype=np.float64)),
        ("positions", [0, 0, 0, 0]),
        ("positions", bytes(32)),
    ],
)
def test_step_buffers_refuse(step_arrays, name, array):
    with pytest.raises(ValueError, match=f"{name} must be a writable, contiguous array of int"):
        StepBuffers(**{**step_arrays, name: array})


TOKEN_MISTAKES = [
    [1.5, 2],
    ["a"],
    "",
    "12",
    b"",
    b"12",
    [2**63],
    np.zeros((2, 2), dtype=np.int64),
    7,
]


@pytest.mark.parametrize("tokens", TOKEN_MISTAKES)
def test_tokens_are_integers(tokens):
    kinds = "a sequence of int or a contiguous array of int64 or int32 with one dimension"
    got = rf"got {re.escape(reprlib.repr(tokens))}$"
    with pytest.raises(TypeError, match=f"^tokens must be {kinds}, {got}"):
        BlockManager(4, 4).lookup(tokens)
    for call in (
        lambda manager: manager.append(tokens),
        lambda manager: manager.batch(tokens, [1], 1),
    ):
        with pytest.raises(TypeError, match=f"^seq_ids must be {kinds}, {got}"):
            call(BlockManager(4, 4))


def test_numbers_are_integers():
    with pytest.raises(TypeError, match=r"num_tokens must be .*, got 1\.5"):
        BlockManager(4, 4).append([0], 1.5)


class Shrinking:
    """An integer that empties the list it stands in when it is read."""

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __index__(self) -> int:
        self.items.clear()
        return 1


def test_tokens_may_change_while_they_are_read():
    manager = BlockManager(4, 2)
    manager.allocate(0, 8)
    manager.publish(0, [1, *range(1_000, 1_007)])
    for _ in range(20):
        items: list[object] = []
        items += [Shrinking(items), *range(1_000, 6_000)]
        assert manager.lookup(items) == 8


def test_counts_may_change_while_they_are_used():
    """Another thread writes to the array that an append works from: each is read once."""
    num_sequences, block_size, turns = 200_000, 64, 30
    manager = BlockManager(num_sequences + 200, block_size)
    seq_ids = np.arange(num_sequences)
    for seq_id in range(num_sequences):
        manager.allocate(seq_id, 0)
    counts = np.ones(num_sequences, dtype=np.int64)
    stop = Event()

    def flip() -> None:
        while not stop.is_set():
            counts[-1] = 100 * block_size
            counts[-1] = 1

    with ThreadPoolExecutor(1) as pool:
        flipping = pool.submit(flip)
        try:
            for _ in range(turns):
                manager.append(seq_ids, counts)
                manager.check()
                assert manager.length(num_sequences - 1) in (1, 100 * block_size)
                manager.truncate(num_sequences - 1, 0)
        finally:
            stop.set()
        flipping.result()


def test_tokens_of_any_kind_are_the_same():
    manager = BlockManager(4, 2)
    manager.allocate(0, 4)
    manager.publish(0, [1, 2, -3, 4])
    for kind in (list, tuple, np.int64, np.int32):
        tokens = np.array([1, 2, -3, 4], dtype=kind) if kind in (np.int64, np.int32) else None
        assert manager.lookup(kind([1, 2, -3, 4]) if tokens is None else tokens) == 4
    assert manager.lookup(range(1, 5)) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m.truncate(0, 4), "num_tokens must be at most 3, got 4"),
        (lambda m, b: m.truncate(0, -1), "num_tokens must be at least 0, got -1"),
        (lambda m, b: m.reserve([0], 0), "num_tokens must be at least 1, got 0"),
        (lambda m, b: m.append([0], [1, 1]), "one entry for each of the 1 sequences, got 2"),
        (
            lambda m, b: m.append([0], 2**31),
            "have at most max_seq_len=2147483647 tokens",
        ),
        (lambda m, b: m.share(0, [1, 2]), "without tokens and blocks, got 0 with 3 tokens in 2"),
        (lambda m, b: m.publish(0, [1, 2, 3, 4]), "number of tokens must be at most 3, got 4"),
        (lambda m, b: m.publish(0, [1, 2], salt=-1), "salt must be at least 0, got -1"),
        (lambda m, b: m.publish(0, [1, 2], salt=3), "the one that the sequence began with, 0"),
        (lambda m, b: m.pin([1, 2, 3, 4]), "cached in all of their 2 full blocks, got 1"),
        (lambda m, b: m.unpin([1, 2]), "those of a pin, no fewer and no more, got 1"),
        (lambda m, b: m.step([0, 0], b), "seq_ids must name each sequence once, got 0 twice"),
        (lambda m, b: m.step(range(5), b), "that was added, got 1"),
        (lambda m, b: (m.append([0], 3), m.step([0], b)), "columns for the 4 blocks of sequence 0"),
    ],
)
def test_wrong_numbers_are_refused(step_arrays, call, message):
    manager = BlockManager(8, 2)
    manager.allocate(0, 3)
    manager.publish(0, [1, 2])
    with pytest.raises(ValueError, match=message):
        call(manager, StepBuffers(**step_arrays))
    manager.check()


def test_step_past_the_longest_sequence_says_so(step_arrays):
    manager = BlockManager(8, 2, max_seq_len=6)
    manager.allocate(0, 6)
    with pytest.raises(ValueError, match=r"sequence 0 must have at most max_seq_len=6 .* got 7"):
        manager.step([0], StepBuffers(**step_arrays))


def test_small_pool_of_large_blocks_takes_little_memory():
    block_size = 65536
    manager = BlockManager(4, block_size)
    manager.allocate(0, block_size)
    before = mapped_bytes()
    manager.publish(0, np.arange(block_size))
    assert mapped_bytes() - before < 2**26
    assert manager.lookup(np.arange(block_size)) == block_size


def test_large_pool():
    manager = BlockManager(8_000_000, 16)
    manager.allocate(0, 128_000_000)
    manager.free(0)
    assert manager.num_free_blocks == 8_000_000


def test_threads_share_a_manager():
    """Each finds its own sequences as it left them."""
    manager = BlockManager(64, 2)
    prompt = list(range(8))

    def work(thread: int) -> None:
        for turn in range(200):
            seq_id = 1_000 * thread + turn
            manager.allocate(seq_id, 0)
            shared = manager.share(seq_id, prompt)
            manager.append([seq_id], 9 - shared)
            manager.publish(seq_id, prompt)
            assert manager.length(seq_id) == 9
            assert len(manager.blocks(seq_id)) == 5
            manager.free(seq_id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    manager.check()
    assert manager.lookup(prompt) == 8
    assert manager.num_free_blocks + manager.num_evictable_blocks == 64
