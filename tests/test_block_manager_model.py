"""Any operations on a BlockManager in any order, against a model of it.

PAGED_OPS_FULL_MODEL=1 runs 2,000 examples of up to 200 steps instead of a few hundred short ones.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from block_model import BlockModel, Sequence
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_ops import BlockManager, OutOfBlocks, StepBuffers

NUM_IDS = 5
IDS = st.integers(0, NUM_IDS - 1)
PICKS = st.integers(-1, 9)  # which of the sequences that there are; -1: an id that is none
SEVERAL = st.lists(PICKS, max_size=3)
SALTS = st.integers(0, 1)
TOKENS = st.integers(0, 1)  # few, so that prefixes meet
SOURCES = st.integers(-1, 9)  # which tokens a prefix is taken from; -1: none


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 10), block_size=st.integers(1, 3), watermark=st.integers(0, 1)
    )
    def start(self, num_blocks: int, block_size: int, watermark: int) -> None:
        self.manager = BlockManager(num_blocks, block_size, watermark)
        self.model = BlockModel(num_blocks, block_size, watermark)
        self.arrays = {
            "block_table": np.zeros((NUM_IDS, num_blocks), dtype=np.int32),
            "seq_lens": np.zeros(NUM_IDS, dtype=np.int32),
            "slot_mapping": np.zeros(NUM_IDS, dtype=np.int64),
            "positions": np.zeros(NUM_IDS, dtype=np.int64),
        }
        self.buffers = StepBuffers(**self.arrays)

    def refused(self, error: type[Exception], call, needed: int = 0) -> None:
        before, arrays = self.manager.state(), {k: v.copy() for k, v in self.arrays.items()}
        with pytest.raises(error) as raised:
            call()
        assert self.manager.state() == before
        assert all(np.array_equal(arrays[name], self.arrays[name]) for name in arrays)
        if isinstance(raised.value, OutOfBlocks):
            assert raised.value.needed == needed
            assert raised.value.free == self.model.num_free()
            assert raised.value.evictable == len(self.model.evictable)

    def known(self, seq_ids: list[int]) -> bool:
        named = all(seq_id in self.model.sequences for seq_id in seq_ids)
        return named and len(set(seq_ids)) == len(seq_ids)

    def pick(self, which: int) -> int:
        ids = sorted(self.model.sequences)
        return ids[which % len(ids)] if ids and which >= 0 else NUM_IDS

    def pick_all(self, which: list[int]) -> list[int]:
        return list(map(self.pick, which))

    @rule(seq_id=IDS, salt=SALTS, num_tokens=st.integers(-1, 9), token=TOKENS)
    def allocate(self, seq_id: int, salt: int, num_tokens: int, token: int) -> None:
        def call() -> None:
            self.manager.allocate(seq_id, num_tokens)

        if seq_id in self.model.sequences or num_tokens < 0:
            return self.refused(ValueError, call)
        needed = self.model.blocks_for(num_tokens) + self.model.kept_back()
        fits = needed <= self.model.num_available()
        assert self.manager.can_allocate(num_tokens) == fits
        if not fits:
            return self.refused(OutOfBlocks, call, needed)
        call()
        return self.model.allocate(seq_id, salt, [token] * num_tokens, self.manager.blocks(seq_id))

    def grow(self, growth: dict[int, int], call) -> bool:
        """Whether the call found blocks for so many more tokens of each sequence."""
        needed = self.model.needed_to_grow(growth)
        if needed > self.model.num_available():
            self.refused(OutOfBlocks, call, needed)
            return False
        copies = call()
        blocks = {seq_id: self.manager.blocks(seq_id) for seq_id in growth}
        self.model.grow(growth, blocks, copies)
        return True

    @rule(which=SEVERAL, num_tokens=st.integers(0, 7), token=TOKENS)
    def append(self, which: list[int], num_tokens: int, token: int) -> None:
        seq_ids = self.pick_all(which)

        def call() -> list[tuple[int, int]]:
            return self.manager.append(seq_ids, num_tokens)

        if not self.known(seq_ids) or num_tokens < 1:
            self.refused(ValueError, call)
        elif self.grow(dict.fromkeys(seq_ids, num_tokens), call):
            for seq_id in seq_ids:
                self.model.write(seq_id, [token] * num_tokens)

    @rule(picked=st.dictionaries(PICKS, st.integers(1, 5), max_size=3), token=TOKENS)
    def append_each(self, picked: dict[int, int], token: int) -> None:
        counts = {self.pick(which): number for which, number in picked.items()}

        def call() -> list[tuple[int, int]]:
            return self.manager.append(list(counts), np.array(list(counts.values()), np.int64))

        if not self.known(list(counts)):
            self.refused(ValueError, call)
        elif self.grow(counts, call):
            for seq_id, num_tokens in counts.items():
                self.model.write(seq_id, [token] * num_tokens)

    @rule(which=st.lists(PICKS, max_size=2), num_tokens=st.integers(0, 7))
    def reserve(self, which: list[int], num_tokens: int) -> None:
        seq_ids = self.pick_all(which)

        def call() -> list[tuple[int, int]]:
            return self.manager.reserve(seq_ids, num_tokens)

        if not self.known(seq_ids) or num_tokens < 1:
            self.refused(ValueError, call)
        else:
            self.grow(dict.fromkeys(seq_ids, num_tokens), call)

    @rule(which=SEVERAL, token=TOKENS)
    def step(self, which: list[int], token: int) -> None:
        seq_ids = self.pick_all(which)

        def call() -> list[tuple[int, int]]:
            return self.manager.step(seq_ids, self.buffers)

        sequences = [self.model.sequences.get(seq_id, Sequence(0)) for seq_id in seq_ids]
        columns = self.model.num_blocks
        fits = all(self.model.blocks_for(len(each.tokens) + 1) <= columns for each in sequences)
        if not self.known(seq_ids) or not fits:
            self.refused(ValueError, call)
        elif self.grow(dict.fromkeys(seq_ids, 1), call):
            for seq_id in seq_ids:
                self.model.write(seq_id, [token])
            self.check_rows(seq_ids)

    def check_rows(self, seq_ids: list[int]) -> None:
        for row, seq_id in enumerate(seq_ids):
            blocks = self.model.sequences[seq_id].blocks
            position = len(self.model.sequences[seq_id].tokens) - 1
            index, within = divmod(position, self.model.block_size)
            assert self.arrays["block_table"][row, : len(blocks)].tolist() == blocks
            assert self.arrays["seq_lens"][row] == position + 1
            assert self.arrays["positions"][row] == position
            slot = blocks[index] * self.model.block_size + within
            assert self.arrays["slot_mapping"][row] == slot
        assert not self.arrays["seq_lens"][len(seq_ids) :].any()
        assert (self.arrays["slot_mapping"][len(seq_ids) :] == -1).all()

    @rule(which=PICKS, num_tokens=st.integers(-1, 9))
    def truncate(self, which: int, num_tokens: int) -> None:
        self.truncate_to(self.pick(which), num_tokens)

    def truncate_to(self, seq_id: int, num_tokens: int) -> None:
        sequence = self.model.sequences.get(seq_id)
        if sequence is None or not 0 <= num_tokens <= len(sequence.tokens):
            self.refused(ValueError, lambda: self.manager.truncate(seq_id, num_tokens))
            return
        self.manager.truncate(seq_id, num_tokens)
        self.model.truncate(seq_id, num_tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(which=st.integers(0, 9), rejected=st.integers(1, 3), accepted=st.integers(1, 3))
    def speculate(self, which: int, rejected: int, accepted: int) -> None:
        """Tokens are dropped and others appended in their place."""
        seq_id = self.pick(which)
        tokens = self.model.sequences[seq_id].tokens
        if tokens:
            token = 1 - tokens[-1]
            self.truncate_to(seq_id, max(len(tokens) - rejected, 0))
            self.append([which], accepted, token)

    @rule(which=PICKS, child=IDS)
    def fork(self, which: int, child: int) -> None:
        parent = self.pick(which)
        if parent not in self.model.sequences or child in self.model.sequences:
            self.refused(ValueError, lambda: self.manager.fork(parent, child))
            return
        self.manager.fork(parent, child)
        self.model.fork(parent, child)

    @rule(which=PICKS)
    def free(self, which: int) -> None:
        seq_id = self.pick(which)
        if seq_id not in self.model.sequences:
            self.refused(ValueError, lambda: self.manager.free(seq_id))
            return
        self.manager.free(seq_id)
        self.model.free(seq_id)

    @rule(which=PICKS)
    def preempt(self, which: int) -> None:
        seq_id = self.pick(which)
        if seq_id not in self.model.sequences:
            self.refused(ValueError, lambda: self.manager.preempt(seq_id))
            return
        length = len(self.model.sequences[seq_id].tokens)
        assert self.manager.preempt(seq_id) == length
        self.model.truncate(seq_id, 0)

    @rule(which=PICKS, missing=st.integers(0, 2))
    def publish(self, which: int, missing: int) -> None:
        seq_id = self.pick(which)
        sequence = self.model.sequences.get(seq_id)
        if sequence is None:
            self.refused(ValueError, lambda: self.manager.publish(seq_id, []))
            return
        tokens = sequence.tokens[: max(len(sequence.tokens) - missing, 0)]
        published = self.manager.publish(seq_id, tokens, sequence.salt)
        assert published == self.model.publish(seq_id, len(tokens))

    @rule(which=PICKS)
    def finish(self, which: int) -> None:
        self.publish(which, missing=1)
        self.free(which)

    @rule(seq_id=IDS, source=SOURCES, token=TOKENS, more=st.integers(1, 4))
    def begin(self, seq_id: int, source: int, token: int, more: int) -> None:
        if seq_id not in self.model.sequences:
            self.share(seq_id, source, 12, token, 0)
        if seq_id in self.model.sequences:
            self.append([sorted(self.model.sequences).index(seq_id)], more, token)

    def prefix(self, source: int, length: int, token: int, salt: int) -> tuple[list[int], int]:
        """Tokens that begin as a sequence or a cached prefix does, or not at all."""
        origins = [(each.tokens, each.salt) for each in self.model.sequences.values()]
        origins += [(list(tokens), salt) for salt, tokens in self.model.entries]
        if origins and source >= 0:
            tokens, salt = origins[source % len(origins)]
            return [*tokens, *[token] * 3][:length], salt
        return [token] * length, salt

    @rule(
        seq_id=IDS, source=st.integers(-1, 9), length=st.integers(0, 12), token=TOKENS, salt=SALTS
    )
    def share(self, seq_id: int, source: int, length: int, token: int, salt: int) -> None:
        tokens, salt = self.prefix(source, length, token, salt)
        if seq_id not in self.model.sequences:
            self.refused(ValueError, lambda: self.manager.share(seq_id, tokens, salt))
            self.allocate(seq_id, salt, 0, token)
        sequence = self.model.sequences.get(seq_id)
        if sequence is None or sequence.blocks:
            self.refused(ValueError, lambda: self.manager.share(seq_id, tokens, salt))
            return
        found = len(self.model.match(tokens, salt)) * self.model.block_size
        assert self.manager.lookup(tokens, salt) == found
        assert self.manager.share(seq_id, np.array(tokens, dtype=np.int64), salt) == found
        assert self.model.share(seq_id, tokens, salt) == found

    @rule(source=SOURCES, length=st.integers(0, 12), token=TOKENS, salt=SALTS)
    def pin(self, source: int, length: int, token: int, salt: int) -> None:
        tokens, salt = self.prefix(source, length, token, salt)
        blocks = [entry.block for entry in self.model.match(tokens, salt)]
        if len(blocks) < len(tokens) // self.model.block_size:
            self.refused(ValueError, lambda: self.manager.pin(tokens, salt))
            return
        length = self.manager.pin(tokens, salt)
        assert length == len(blocks) * self.model.block_size
        self.model.pin((salt, tuple(tokens[:length])), blocks)

    @precondition(lambda self: self.model.pins)
    @rule(which=st.integers(0, 9), shorter=st.integers(0, 1))
    def unpin(self, which: int, shorter: int) -> None:
        (salt, tokens), _ = self.model.pins[which % len(self.model.pins)]
        tokens = tokens[: len(tokens) - shorter * self.model.block_size]
        key = (salt, tokens)
        if tokens and key not in [pinned for pinned, _ in self.model.pins]:
            self.refused(ValueError, lambda: self.manager.unpin(tokens, salt))
            return
        assert self.manager.unpin(tokens, salt) == len(tokens)
        if tokens:
            self.model.unpin(key)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()
        self.model.reset_prefix_cache()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        state = self.manager.state()
        assert state["num_free_blocks"] == self.model.num_free()
        assert state["num_evictable_blocks"] == len(self.model.evictable)
        assert state["num_cached_blocks"] == len(self.model.entries)
        assert state["num_pinned_blocks"] == len(set(self.model.pinned_blocks()))
        assert state["sequences"] == {
            seq_id: {
                "length": len(sequence.tokens),
                "published_blocks": sequence.published,
                "blocks": sequence.blocks,
            }
            for seq_id, sequence in self.model.sequences.items()
        }
        for block in range(self.model.num_blocks):
            assert self.manager.ref_count(block) == self.model.holders(block)

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        if not hasattr(self, "manager"):
            return
        model = self.model
        for sequence in model.sequences.values():
            read = [mark for block in sequence.blocks for mark in model.slots[block]]
            length = len(sequence.tokens)
            assert read[:length] == model.marks(sequence, length)


FULL = os.environ.get("PAGED_OPS_FULL_MODEL") == "1"
TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(
    max_examples=2000 if FULL else 300,
    stateful_step_count=200 if FULL else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
