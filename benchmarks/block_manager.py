"""The block manager's operations, each beside the time that it is meant to stay under.

    python benchmarks/block_manager.py

Everything runs on one thread of the host; no GPU takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, median_ms

from paged_ops import BlockManager, StepBuffers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from options import Parser, integer

BLOCK_SIZE = 16
PROMPT = 32_768  # tokens
SEQUENCES = 1_024
MAX_BLOCKS = 1_024  # columns of the block table


def allocate_and_free() -> Callable[[], object]:
    """One million blocks, for a thousand sequences."""
    manager = BlockManager(1_000_000, BLOCK_SIZE)

    def run() -> None:
        for seq_id in range(1_000):
            manager.allocate(seq_id, 1_000 * BLOCK_SIZE)
        for seq_id in range(1_000):
            manager.free(seq_id)

    return run


def evict() -> Callable[[], object]:
    """A hundred thousand blocks, all of which hold cached prefixes."""
    num_blocks = 100_000
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    rounds = iter(range(1_000_000))

    def run() -> None:
        tokens = np.full(num_blocks * BLOCK_SIZE, next(rounds))
        manager.allocate(0, len(tokens))
        manager.publish(0, tokens)
        manager.free(0)

    run()
    return run


def large_pool() -> Callable[[], object]:
    """Eight million blocks: made, taken by one sequence, and given back."""

    def run() -> None:
        manager = BlockManager(8_000_000, BLOCK_SIZE)
        manager.allocate(0, 8_000_000 * BLOCK_SIZE)
        manager.free(0)

    return run


def lookup(tokens: np.ndarray) -> Callable[[], object]:
    manager = BlockManager(100_000, BLOCK_SIZE)
    manager.allocate(0, len(tokens))
    manager.publish(0, tokens)
    assert manager.lookup(tokens) == len(tokens)
    return lambda: manager.lookup(tokens)


def lookup_in_dict(tokens: np.ndarray) -> Callable[[], object]:
    """The same in Python: a dict from (block before, tokens of the block) to the block."""
    listed = tokens.tolist()
    blocks: dict[tuple[int, tuple[int, ...]], int] = {}

    def walk() -> int:
        block = -1
        for start in range(0, len(listed), BLOCK_SIZE):
            found = blocks.get((block, tuple(listed[start : start + BLOCK_SIZE])))
            if found is None:
                return start
            block = found
        return len(listed)

    for start in range(0, len(listed), BLOCK_SIZE):
        index = start // BLOCK_SIZE
        blocks[index - 1, tuple(listed[start : start + BLOCK_SIZE])] = index
    assert walk() == len(listed)
    return walk


def step() -> Callable[[], object]:
    """A decode step of 1,024 sequences of up to 8,192 tokens."""
    manager = BlockManager(1_000_000, BLOCK_SIZE)
    arrays = {
        "block_table": np.zeros((SEQUENCES, MAX_BLOCKS), dtype=np.int32),
        "seq_lens": np.zeros(SEQUENCES, dtype=np.int32),
        "slot_mapping": np.zeros(SEQUENCES, dtype=np.int64),
        "positions": np.zeros(SEQUENCES, dtype=np.int64),
    }
    buffers = StepBuffers(**arrays)
    seq_ids = list(range(SEQUENCES))
    for seq_id, length in enumerate(np.random.default_rng(0).integers(1, 8_192, SEQUENCES)):
        manager.allocate(seq_id, int(length))
    manager.step(seq_ids, buffers)
    return lambda: manager.step(seq_ids, buffers)


def main() -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--rounds", type=integer(1), default=100, help="of the short ones; others a tenth"
    )
    rounds = parser.parse_args().rounds
    tokens = np.random.default_rng(0).integers(0, 128_000, PROMPT)
    short = {
        "step, 1,024 sequences": step(),
        "lookup, 32k-token prompt": lookup(tokens),
        "lookup, dict of tuples": lookup_in_dict(tokens),
    }
    long = {
        "1 M blocks allocated and freed": allocate_and_free(),
        "100 k blocks evicted and published": evict(),
        "pool of 8 M blocks, used once": large_pool(),
    }
    limits_us = {
        "step, 1,024 sequences": 60,
        "lookup, 32k-token prompt": 150,
        "1 M blocks allocated and freed": 60_000,
    }
    cpu = torch.device("cpu")
    times = interleaved(short, cpu, rounds) | interleaved(long, cpu, max(rounds // 10, 1))
    medians = {name: 1e3 * median_ms(seconds) for name, seconds in times.items()}
    print(f"{'':36}{'median':>12}{'best':>12}{'limit':>12}   us")
    for name, seconds in times.items():
        limit = limits_us.get(name, "")
        print(f"{name:36}{medians[name]:12.1f}{1e6 * min(seconds):12.1f}{limit:>12}")
    ratio = medians["lookup, dict of tuples"] / medians["lookup, 32k-token prompt"]
    print(f"a lookup is {ratio:.1f} times as fast as the dict (limit: 20)")


if __name__ == "__main__":
    main()
