"""Decoding on the device: from one token to the next the host launches one step and nothing else.

A step takes the tokens and lengths that the step before it left, and leaves its own in the same
memory; where the next keys and values go, it finds in the block table. So the host is needed once
in a chunk of steps: it reserves the blocks that the chunk may fill and sends the block table, all
without waiting for the device. On a GPU a step is a CUDA graph, captured once for each number of
rows that batches are rounded up to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from decoder import Decoder
from torch import Tensor

from paged_ops import Batch, PagedAttentionManager


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Token ids int64 [S] from logits float32 [S, V].

        Unless greedy: `noise` has the shape of the logits and is distributed exponentially. Of such
        times, each divided by a rate, the shortest is i's in proportion to the rate of i.
        """
        if self.temperature == 0:
            return largest(logits)
        probabilities = torch.softmax(logits / self.temperature, -1)
        if self.top_p < 1:
            probabilities = keep_nucleus(probabilities, self.top_p)
        return largest(probabilities / noise)

    def renew(self, noise: Tensor | None) -> Tensor | None:
        """Draw the noise of one step, in place: not compiled, because it keeps a generator."""
        return None if noise is None else noise.exponential_(generator=self.generator)


def largest(scores: Tensor) -> Tensor:
    """Where the first of the largest scores [S, V] is, int64 [S].

    In two steps: one reduction over a vocabulary would have one CTA for each sequence.
    """
    chunk = 1024
    missing = -scores.shape[-1] % chunk
    chunks = F.pad(scores, (0, missing), value=-inf).unflatten(-1, (-1, chunk))
    best, at = chunks.max(-1)
    which = best.argmax(-1, keepdim=True)
    return (which * chunk + at.gather(-1, which)).squeeze(-1)


def keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest tokens that reach top_p together (Holtzman et al., 2020)."""
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered * (before < top_p))


@dataclass(frozen=True)
class State:
    """What a step leaves to the next, always in the same memory; a row for each sequence.

    Attributes:
        tokens: int64 [n], the newest token of each sequence, which is not in the cache yet.
        seq_lens: int32 [n], tokens of each sequence, the newest one included; 0 in rows that are
            padding. An operator takes them as they are: what a step computed first, Inductor would
            compute for each layer anew.
        block_table: int32 [n, max_blocks]; blocks that a chunk may fill are there in advance.
        chosen: int64 [n, steps], what the steps of this chunk have chosen.
        count: int64 [1], how many steps that were.
        noise: float32 [n, V], what sampling draws from; None if it is greedy.
    """

    tokens: Tensor
    seq_lens: Tensor
    block_table: Tensor
    chosen: Tensor
    count: Tensor
    noise: Tensor | None

    def first(self, rows: int) -> State:
        """The part of so many rows."""
        return State(
            first_rows(self.tokens, rows),
            first_rows(self.seq_lens, rows),
            first_rows(self.block_table, rows),
            first_rows(self.chosen, rows),
            self.count,
            None if self.noise is None else first_rows(self.noise, rows),
        )


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """The same memory and no view: a compiled step would guard on the size of a view's base."""
    part = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return part.set_(tensor.untyped_storage(), 0, (rows, *tensor.shape[1:]), tensor.stride())


def next_batch(seq_lens: Tensor, block_table: Tensor, block_size: int) -> Batch:
    """What PagedAttentionManager.step says of sequences that have so many tokens after it.

    On the device; seq_lens may be 0 in rows that are padding.
    """
    running = seq_lens > 0
    positions = torch.where(running, seq_lens.long() - 1, 0)
    blocks = block_table.gather(1, (positions // block_size)[:, None]).squeeze(1)
    slots = blocks.long() * block_size + positions % block_size
    return Batch(
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=None,
        slot_mapping=torch.where(running, slots, -1),
        positions=positions,
    )


def decode_step(model: Decoder, caches: list[Tensor], state: State, sampling: Sampling) -> None:
    """One more token of each sequence, from its embedding to its successor: what is compiled."""
    batch = next_batch(state.seq_lens, state.block_table, caches[0].shape[2])
    tokens = sampling(model(state.tokens, caches, batch), state.noise)
    state.chosen.index_copy_(1, state.count, tokens[:, None])
    state.count.add_(1)
    state.tokens.copy_(tokens)
    state.seq_lens.add_(state.seq_lens > 0)


Step = Callable[[Decoder, list[Tensor], State, Sampling], None]


# Of Inductor on a GPU: what several kernels take, or what took many operations, is computed once
# and stored, so that all layers have the same kernels; and kernels are launched while the one
# before still runs (programmatic dependent launch, from compute capability 9.0 on).
INDUCTOR_OPTIONS: Mapping[str, bool | int] = {
    "realize_opcount_threshold": 8,
    "realize_reads_threshold": 1,
    "triton.enable_pdl": True,
}


def compile_step(
    device: torch.device, options: Mapping[str, bool | int] = INDUCTOR_OPTIONS
) -> Step:
    """decode_step, compiled for this device: PyTorch does so for one row, and for any more.

    Args:
        device: of the model.
        options: of Inductor on a GPU.
    """
    if device.type == "cuda":
        return torch.compile(decode_step, fullgraph=True, options=dict(options))
    # Frozen weights are repacked for the matrix kernels: a step reads them at twice the speed. A
    # patch, and no option of torch.compile, because Dynamo has to know of it while it traces.
    freeze = torch._inductor.config.patch(freezing=True)
    return freeze(torch.compile(decode_step, fullgraph=True, dynamic=True))


@dataclass(frozen=True)
class Chunk:
    """Some steps that were launched.

    Attributes:
        seq_ids: the sequences, in the order of the rows.
        tokens: int64 [n, steps] in host memory; `wait` for them.
        copied: when the device has written them; None on a CPU.
        prepared: whether the launch compiled or captured a step, which takes its time.
    """

    seq_ids: list[int]
    tokens: Tensor
    copied: torch.cuda.Event | None
    prepared: bool = False

    @property
    def steps(self) -> int:
        return self.tokens.shape[1]

    def wait(self) -> list[list[int]]:
        """The tokens of each step, each in the order of the sequences."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens.T.tolist()


class DecodeLoop:
    """Launches chunks of steps over sequences of a manager.

    Args:
        model: what decodes.
        manager: holds the sequences; its caches are written.
        step: decode_step, compiled or not.
        sampling: how tokens are chosen.
        max_steps: of a chunk, at the most.
    """

    def __init__(
        self,
        model: Decoder,
        manager: PagedAttentionManager,
        step: Step,
        sampling: Sampling,
        max_steps: int,
    ) -> None:
        self.model, self.manager, self.step, self.sampling = model, manager, step, sampling
        rows, device = manager.num_sequences, manager.device
        noisy = sampling.temperature > 0
        self.state = State(
            tokens=torch.zeros(rows, dtype=torch.int64, device=device),
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
            block_table=torch.zeros(rows, manager.max_blocks, dtype=torch.int32, device=device),
            chosen=torch.zeros(rows, max_steps, dtype=torch.int64, device=device),
            count=torch.zeros(1, dtype=torch.int64, device=device),
            noise=torch.ones(rows, model.config.vocab_size, device=device) if noisy else None,
        )
        self.seq_ids: list[int] = []  # in the order of the rows
        self.prepared: dict[int, Callable[[], object]] = {}  # by rows: how a step is launched
        self.pool: tuple[int, int] | None = None  # of all graphs: they never run side by side

    def begin(self, seq_ids: Sequence[int], logits: Tensor) -> Chunk:
        """Choose the first tokens, which follow the prompts: a chunk of one step."""
        self.seq_ids = list(seq_ids)
        state = self.state.first(len(self.seq_ids))
        state.tokens.copy_(self.sampling(logits, self.sampling.renew(state.noise)))
        return self._chunk(state.tokens[:, None], prepared=False)

    def launch(self, seq_ids: Sequence[int], steps: int) -> Chunk:
        """Decode `steps` tokens of each of these sequences, which the chunk before had too."""
        rows = self.rows_for(len(seq_ids))
        self._select(seq_ids)
        self.manager.reserve(self.seq_ids, steps)
        self._send(rows)
        self.manager.append(self.seq_ids, steps)
        first = rows not in self.prepared
        if first:
            self.prepared[rows] = self._prepare(self.state.first(rows))
        for _ in range(steps):
            self.prepared[rows]()
        return self._chunk(self.state.chosen[: len(self.seq_ids), :steps], prepared=first)

    def rows_for(self, num_seqs: int) -> int:
        """The rows of a batch: on a GPU, powers of two, so that few graphs serve all sizes.

        A CPU computes padding, and captures nothing; but PyTorch compiles the size 1 apart.
        """
        rows = 1 << (num_seqs - 1).bit_length() if self.manager.device.type == "cuda" else 2
        return min(max(rows, num_seqs), self.manager.num_sequences)

    def _select(self, seq_ids: Sequence[int]) -> None:
        """Move the newest tokens of these sequences to the first rows."""
        if list(seq_ids) == self.seq_ids:
            return
        row_of = {seq_id: row for row, seq_id in enumerate(self.seq_ids)}
        kept = torch.tensor([row_of[seq_id] for seq_id in seq_ids])
        tokens = self.state.tokens
        if tokens.is_cuda:
            kept = kept.pin_memory()
        tokens[: len(kept)] = tokens[kept.to(tokens.device, non_blocking=True)]
        self.seq_ids = list(seq_ids)

    def _send(self, rows: int) -> None:
        """Tell the device where the sequences stand."""
        state = self.state.first(rows)
        batch = self.manager.batch(self.seq_ids, 0, pad_to=rows)
        state.seq_lens.copy_(batch.seq_lens + (batch.seq_lens > 0))
        state.block_table.copy_(batch.block_table)
        state.count.zero_()

    def _prepare(self, state: State) -> Callable[[], object]:
        """How to launch a step over these rows."""

        def call() -> None:
            self.sampling.renew(state.noise)
            self.step(self.model, self.manager.caches, state, self.sampling)

        if self.manager.device.type != "cuda":
            return call
        if len(state.tokens) > 1:
            mark_rows(state)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        generator = None if state.noise is None else self.sampling.generator
        with torch.cuda.device(state.tokens.device):
            return capture(call, state, generator, self.pool)

    def _chunk(self, tokens: Tensor, prepared: bool) -> Chunk:
        """The tokens, on their way to the host; the device goes on to write others here."""
        if not tokens.is_cuda:
            return Chunk(self.seq_ids, tokens.clone(), None, prepared)
        host = tokens.to("cpu", non_blocking=True)  # pinned
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tokens.device))
        return Chunk(self.seq_ids, host, copied, prepared)


def mark_rows(state: State) -> None:
    """Compile for any number of rows: only they differ from one batch to another."""
    for tensor in (state.tokens, state.seq_lens, state.block_table, state.chosen, state.noise):
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)


def capture(
    call: Callable[[], object],
    state: State,
    generator: torch.Generator | None,
    pool: tuple[int, int],
) -> Callable[[], object]:
    """A CUDA graph of a step over these rows, its intermediate results in a pool of memory.

    Before it is captured, the step runs from where the rows stand, to be compiled: the cache then
    holds the keys and values that the graph will write again, and the rows are put back.
    """
    changed = (state.tokens, state.seq_lens, state.count)
    saved = [tensor.clone() for tensor in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # the second time with what the first one has compiled and chosen
            call()
            for tensor, before in zip(changed, saved, strict=True):
                tensor.copy_(before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay
