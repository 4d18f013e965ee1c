"""BlockManager once more, in plain Python: who holds, who wrote, and what would be evicted.

The model knows what each slot of the cache holds: a mark that stands for the salt and all tokens up
to the slot's own. A sequence that finds other marks than its own has been served wrong data.
Which free block is taken is left to the manager; the model is told and objects if it was not free.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Key = tuple[int, tuple[int, ...]]  # salt and tokens


@dataclass(eq=False)
class Entry:
    """A cached block; `previous` is the entry that it was published after."""

    key: Key
    block: int
    previous: Entry | None


@dataclass
class Sequence:
    salt: int
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    last: Entry | None = None
    passed: Entry | None = None  # the last of the published ones that is another's block

    def unpublish(self) -> None:
        self.published, self.last, self.passed = 0, None, None


class BlockModel:
    def __init__(self, num_blocks: int, block_size: int, watermark: int) -> None:
        self.num_blocks, self.block_size, self.watermark = num_blocks, block_size, watermark
        self.sequences: dict[int, Sequence] = {}
        self.pins: list[tuple[Key, list[int]]] = []  # what was pinned, and its blocks
        self.entries: dict[Key, Entry] = {}
        self.entry_of: dict[int, Entry] = {}  # by block
        self.evictable: list[int] = []  # the least recently used first
        self.slots: dict[int, list[object]] = {}  # marks, by block

    # What can be asked.

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holders(self, block: int) -> int:
        held = sum(sequence.blocks.count(block) for sequence in self.sequences.values())
        return held + self.pinned_blocks().count(block)

    def pinned_blocks(self) -> list[int]:
        return [block for _, blocks in self.pins for block in blocks]

    def held_blocks(self) -> set[int]:
        return {block for each in self.sequences.values() for block in each.blocks} | set(
            self.pinned_blocks()
        )

    def num_free(self) -> int:
        return self.num_blocks - len(self.held_blocks()) - len(self.evictable)

    def num_available(self) -> int:
        return self.num_blocks - len(self.held_blocks())

    def kept_back(self) -> int:
        return self.watermark if any(each.blocks for each in self.sequences.values()) else 0

    def marks(self, sequence: Sequence, end: int) -> list[object]:
        return [(sequence.salt, tuple(sequence.tokens[: i + 1])) for i in range(end)]

    def match(self, tokens: list[int], salt: int) -> list[Entry]:
        found: list[Entry] = []
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            entry = self.entries.get((salt, tuple(tokens[:end])))
            if entry is None or entry.previous is not (found[-1] if found else None):
                break
            found.append(entry)
        return found

    def needed_to_grow(self, growth: dict[int, int]) -> int:
        """Counts by playing it through: each writer leaves a shared block while others hold it."""
        needed, left = 0, []
        for seq_id, num_tokens in growth.items():
            sequence = self.sequences[seq_id]
            length = len(sequence.tokens)
            needed += max(self.blocks_for(length + num_tokens) - len(sequence.blocks), 0)
            if length % self.block_size:
                block = sequence.blocks[length // self.block_size]
                if self.holders(block) - left.count(block) > 1:
                    left.append(block)
                    needed += 1
        return needed

    # What changes it; `blocks` are those of the manager afterwards.

    def take(self, block: int) -> None:
        """The manager has taken this block: it was free, or the next to be evicted."""
        if self.num_free() == 0:
            assert block == self.evictable[0]
            self.forget(block)
        assert block not in self.held_blocks()
        assert block not in self.evictable
        self.slots[block] = [None] * self.block_size

    def release(self, block: int) -> None:
        """Called when nobody lists the block any more, or fewer do."""
        if self.holders(block) == 0 and block in self.entry_of:
            self.evictable.append(block)

    def has(self, entry: Entry) -> bool:
        return self.entry_of.get(entry.block) is entry

    def forget(self, block: int) -> None:
        del self.entries[self.entry_of.pop(block).key]
        if block in self.evictable:
            self.evictable.remove(block)

    def allocate(self, seq_id: int, salt: int, tokens: list[int], blocks: list[int]) -> None:
        self.sequences[seq_id] = Sequence(salt)
        self.grow({seq_id: len(tokens)}, {seq_id: blocks}, [])
        self.write(seq_id, tokens)

    def grow(
        self, growth: dict[int, int], blocks: dict[int, list[int]], copies: list[tuple[int, int]]
    ) -> None:
        """Blocks for so many more tokens of each sequence, in the order of the call."""
        expected = []
        for seq_id in growth:
            sequence, now = self.sequences[seq_id], blocks[seq_id]
            index, within = divmod(len(sequence.tokens), self.block_size)
            if within and self.holders(old := sequence.blocks[index]) > 1:
                self.take(now[index])
                sequence.blocks[index] = now[index]
                expected.append((old, now[index]))
            elif within and sequence.blocks[index] in self.entry_of:
                self.forget(sequence.blocks[index])
            for block in now[len(sequence.blocks) :]:
                self.take(block)
                sequence.blocks.append(block)
            assert sequence.blocks == now
            wanted = self.blocks_for(len(sequence.tokens) + growth[seq_id])
            assert len(now) >= wanted
        assert copies == expected
        for source, destination in copies:
            self.slots[destination] = list(self.slots[source])

    def write(self, seq_id: int, tokens: list[int]) -> None:
        sequence = self.sequences[seq_id]
        start = len(sequence.tokens)
        sequence.tokens = sequence.tokens + tokens
        marks = self.marks(sequence, len(sequence.tokens))
        for position in range(start, len(sequence.tokens)):
            block = sequence.blocks[position // self.block_size]
            assert self.holders(block) == 1, "what is written is held by its sequence alone"
            assert block not in self.entry_of, "and cached by nobody"
            self.slots[block][position % self.block_size] = marks[position]

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = self.sequences[seq_id]
        while len(sequence.blocks) > self.blocks_for(num_tokens):
            self.release(sequence.blocks.pop())
        sequence.tokens = sequence.tokens[:num_tokens]
        if num_tokens // self.block_size < sequence.published:
            sequence.unpublish()

    def free(self, seq_id: int) -> None:
        self.truncate(seq_id, 0)
        del self.sequences[seq_id]

    def fork(self, parent: int, child: int) -> None:
        copied = self.sequences[parent]
        self.sequences[child] = Sequence(
            copied.salt,
            copied.tokens,
            copied.blocks[: self.blocks_for(len(copied.tokens))],
            copied.published,
            copied.last,
            copied.passed,
        )

    def share(self, seq_id: int, tokens: list[int], salt: int) -> int:
        found = self.match(tokens, salt)
        blocks = [entry.block for entry in found]
        self.evictable = [block for block in self.evictable if block not in blocks]
        length = len(found) * self.block_size
        last = found[-1] if found else None
        self.sequences[seq_id] = Sequence(salt, tokens[:length], blocks, len(found), last)
        return length

    def publish(self, seq_id: int, num_tokens: int) -> int:
        sequence = self.sequences[seq_id]
        if any(entry and not self.has(entry) for entry in (sequence.last, sequence.passed)):
            sequence.unpublish()
        while sequence.published < num_tokens // self.block_size:
            end = (sequence.published + 1) * self.block_size
            key = (sequence.salt, tuple(sequence.tokens[:end]))
            block = sequence.blocks[sequence.published]
            entry = self.entries.get(key)
            if entry is None or entry.previous is not sequence.last:
                if entry is not None:
                    assert entry.block not in self.pinned_blocks()
                    self.forget(entry.block)
                if block in self.entry_of:
                    break
                entry = self.entries[key] = self.entry_of[block] = Entry(key, block, sequence.last)
            if entry.block != block:
                sequence.passed = entry
            sequence.last = entry
            sequence.published += 1
        return sequence.published * self.block_size

    def pin(self, key: Key, blocks: list[int]) -> None:
        self.evictable = [block for block in self.evictable if block not in blocks]
        if blocks:
            self.pins.append((key, blocks))

    def unpin(self, key: Key) -> None:
        index = [pinned for pinned, _ in self.pins].index(key)
        _, blocks = self.pins.pop(index)
        for block in reversed(blocks):
            self.release(block)

    def reset_prefix_cache(self) -> None:
        self.pins, self.evictable = [], []
        self.entries, self.entry_of = {}, {}
        for sequence in self.sequences.values():
            sequence.unpublish()
