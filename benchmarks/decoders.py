"""What decodes the tokens of a case, step by step: the examples' loop and what it is beside.

All of them compute the same model at the same lengths, and are compiled and captured as a CUDA
graph where there is a GPU. They differ in where keys and values are kept, and in what attends.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from decode_loop import DecodeLoop, Sampling, Step, compile_step, decode_step, largest
from decoder import Attention, Decoder
from timing import cuda_graph, median_ms, seconds_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from paged_ops import Batch, PagedAttentionManager, ops

BLOCK_SIZE = 16
CHUNK = 16  # steps from one look for stop tokens to the next


@dataclass(frozen=True)
class Case:
    """So many sequences of so many tokens; ragged: evenly from a sixteenth to all of them."""

    batch: int
    context: int
    ragged: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """`64x4096` or `64x4k`, and with an `r` at the end if it is ragged."""
        batch, context = text.removesuffix("r").replace("k", "*1024").split("x")
        return cls(int(batch), prod(map(int, context.split("*"))), text.endswith("r"))

    def __str__(self) -> str:
        thousands, rest = divmod(self.context, 1024)
        context = f"{self.context}" if rest else f"{thousands}k"
        return f"{self.batch}x{context}{'r' if self.ragged else ''}"

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of each sequence, the last one the longest."""
        if not self.ragged:
            return [self.context] * self.batch
        shortest = self.context / 16
        step = (self.context - shortest) / max(self.batch - 1, 1)
        return [round(self.context - step * i) for i in reversed(range(self.batch))]


@dataclass(frozen=True)
class Setup:
    """What every contender is given.

    Attributes:
        model: the weights.
        cases: all that will be started, in this order.
        steps: that will be launched of a case, at the most, before it is restarted.
        options: Inductor's, for our model on a GPU.
    """

    model: Decoder
    cases: Sequence[Case]
    steps: int
    options: dict[str, bool | int]

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and caches."""
        return self.model.embedding.weight.dtype

    def first_lens(self, case: Case) -> list[int]:
        """Lengths at which to start, so that those of the case come halfway."""
        return [max(n - self.steps // 2, 1) for n in case.seq_lens]

    def num_blocks(self, case: Case) -> int:
        """Of a cache that holds the case and its steps."""
        return sum(-(-(n + self.steps) // BLOCK_SIZE) for n in self.first_lens(case))

    def padded_len(self, case: Case) -> int:
        """Slots for the longest sequence; masks have to be aligned."""
        return -(-(max(self.first_lens(case)) + self.steps) // 64) * 64


class Contender(Protocol):
    """Decodes cases, one after another.

    Attributes:
        own_bytes: of its caches, and of weights that only it has.
        captures: CUDA graphs that it has captured itself since the beginning.
    """

    own_bytes: int
    captures: int

    def start(self, case: Case) -> None:
        """Fill the caches at random, and compile and capture what is not yet."""

    def restart(self) -> None:
        """Go back to the first lengths of the case."""

    def launch(self, steps: int) -> None:
        """Decode, without waiting for the device."""


class Paged:
    """The loop of the examples: one cache, and one compiled step, for all cases."""

    def __init__(self, setup: Setup, step: Step) -> None:
        self.setup = setup
        config = setup.model.config
        before = allocated_bytes(setup.device)
        self.manager = PagedAttentionManager(
            max(case.batch for case in setup.cases),
            config.num_kv_heads,
            config.head_size,
            BLOCK_SIZE,
            max(map(setup.num_blocks, setup.cases)),
            setup.device,
            setup.dtype,
            config.num_layers,
            max_seq_len=max(case.context for case in setup.cases) + setup.steps,
        )
        self.own_bytes = sum(cache.nbytes for cache in self.manager.caches)
        if setup.device.type == "cuda":
            ratio = (allocated_bytes(setup.device) - before) / self.own_bytes
            print(f"  the manager has allocated {ratio:.4f} times what its blocks should take")
        for cache in self.manager.caches:
            cache.normal_()
        self.loop = DecodeLoop(setup.model, self.manager, step, Sampling(), CHUNK)
        self.first_lens: dict[int, int] = {}

    @property
    def captures(self) -> int:
        """One for each number of rows."""
        return len(self.loop.prepared) if self.setup.device.type == "cuda" else 0

    def start(self, case: Case) -> None:
        """The blocks hold something from the beginning."""
        for seq_id in self.first_lens:
            self.manager.free_sequence(seq_id)
        self.first_lens = dict(enumerate(self.setup.first_lens(case)))
        for seq_id, seq_len in self.first_lens.items():
            self.manager.add_sequence(seq_id, seq_len)
        vocab_size = self.setup.model.config.vocab_size
        logits = torch.randn(case.batch, vocab_size, device=self.setup.device)
        self.last = self.loop.begin(list(self.first_lens), logits)
        self.launch(CHUNK)

    def restart(self) -> None:
        """Give up the blocks behind."""
        for seq_id, seq_len in self.first_lens.items():
            self.manager.truncate(seq_id, seq_len)

    def launch(self, steps: int) -> None:
        """Read the tokens of the launch before meanwhile."""
        chunk = self.loop.launch(list(self.first_lens), steps)
        self.last.wait()
        self.last = chunk


def forget(device: torch.device) -> None:
    """Give up what was compiled and captured, and the memory that nothing refers to."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated_bytes(device: torch.device) -> int:
    """By tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class IndexPutAttention(Attention):
    """Writes with PyTorch's index_put_, which with several rows Inductor fuses with the rotation.

    The slot -1 of padding is the last one of the cache here, which holds nothing that matters.
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: Batch
    ) -> Tensor:
        """As Attention's, one token for each sequence."""
        block_size = kv_cache.shape[2]
        block, offset = batch.slot_mapping // block_size, batch.slot_mapping % block_size
        half = torch.arange(2, device=key.device)
        # At once: of two, each through a view, Inductor makes copies of the cache.
        kv_cache[block[:, None], half, offset[:, None]] = torch.stack((key, value), 1)
        return ops.attention(query, kv_cache, batch.block_table, batch.seq_lens, window=self.window)


class DenseAttention(Attention):
    """Attends with PyTorch's SDPA, under a mask, to a cache padded to the longest sequence.

    The cache is [2, S, H, max_seq_len, D].
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: Batch
    ) -> Tensor:
        """The query heads of a KV head are the rows of one product, which reads each key once."""
        num_seqs, num_kv_heads = key.shape[:2]
        rows = torch.arange(num_seqs, device=key.device)
        half = torch.arange(2, device=key.device)[:, None]
        # At once: of two, each through a view, Inductor makes copies of the cache.
        kv_cache[half, rows, :, batch.positions] = torch.stack((key, value))
        keys = torch.arange(kv_cache.shape[3], device=key.device)
        mask = keys < batch.seq_lens[:, None]
        grouped = query.unflatten(1, (num_kv_heads, -1))  # [S, H, Q / H, D]
        mask = mask[:, None, None].expand(-1, -1, grouped.shape[2], -1)
        out = F.scaled_dot_product_attention(grouped, kv_cache[0], kv_cache[1], attn_mask=mask)
        return out.flatten(1, 2)


def with_attention(model: Decoder, kind: type[Attention]) -> Decoder:
    """The same decoder and the same weights, with another attention."""
    other = Decoder.without_weights(model.config, model.frequencies.device)
    with torch.device("meta"):
        for layer in other.layers:
            layer.attention = kind(model.config)
    other.assign_weights(model.state_dict())
    return other


def dense_step(model: Decoder, caches: list[Tensor], tokens: Tensor, seq_lens: Tensor) -> None:
    """decode_step over dense caches: no blocks and no slots."""
    nothing = seq_lens.new_empty(0)
    batch = Batch(nothing, seq_lens, None, nothing, seq_lens.long() - 1)
    tokens.copy_(largest(model(tokens, caches, batch)))
    seq_lens.add_(1)


class Dense:
    """The same decoder over dense caches, with the fastest of SDPA's kernels."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = with_attention(setup.model, DenseAttention)
        self.caches: list[Tensor] = []
        self.own_bytes = self.captures = 0

    def start(self, case: Case) -> None:
        """A cache, a compilation and a capture for each case: shapes are static."""
        setup, config, device = self.setup, self.setup.model.config, self.setup.device
        self.call: Callable[[], object] | None = None
        self.caches.clear()
        forget(device)
        shape = (2, case.batch, config.num_kv_heads, setup.padded_len(case), config.head_size)
        for _ in range(config.num_layers):
            self.caches.append(torch.empty(shape, dtype=setup.dtype, device=device).normal_())
        self.own_bytes = sum(cache.nbytes for cache in self.caches)
        self.first_lens = torch.tensor(setup.first_lens(case), dtype=torch.int32, device=device)
        self.seq_lens = self.first_lens.clone()
        tokens = torch.zeros(case.batch, dtype=torch.int64, device=device)
        step = torch.compile(dense_step, fullgraph=True, dynamic=False, options=setup.options)
        call = partial(step, self.model, self.caches, tokens, self.seq_lens)
        group_size = config.num_heads // config.num_kv_heads
        with fastest_sdpa(group_size, self.caches[0], self.seq_lens):
            call()
            self.call = call
            if device.type == "cuda":
                self.call = cuda_graph([call])
                self.captures += 1

    def restart(self) -> None:
        """What was written behind is hidden by the lengths."""
        self.seq_lens.copy_(self.first_lens)

    def launch(self, steps: int) -> None:
        """Nobody reads the tokens."""
        for _ in range(steps):
            self.call()


def fastest_sdpa(
    group_size: int, kv_cache: Tensor, seq_lens: Tensor
) -> AbstractContextManager[None]:
    """SDPA with the kernel that is fastest for these shapes and takes a mask."""
    if not kv_cache.is_cuda:
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else it widens the whole cache
    key, value = kv_cache
    query = key[:, :, :group_size].contiguous()
    mask = torch.arange(key.shape[2], device=key.device) < seq_lens[:, None]
    mask = mask[:, None, None].expand(-1, -1, group_size, -1)
    times = {}
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        call = partial(F.scaled_dot_product_attention, query, key, value, attn_mask=mask)
        try:
            with sdpa_kernel(backend):
                times[backend] = median_ms([seconds_of(call, key.device) for _ in range(5)][1:])
        except RuntimeError:  # this kernel does not take these shapes
            continue
    measured = ", ".join(f"{each.name} {ms:.3f}" for each, ms in times.items())
    print(f"  SDPA of a layer, ms: {measured}", flush=True)
    return sdpa_kernel(min(times, key=times.__getitem__))


class Hub:
    """transformers with its static cache, compiled as its documentation says.

    Sequences are padded on the left to the longest. Its weights are its own.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = hub_model_of(setup)
        self.weight_bytes = sum(each.nbytes for each in self.model.parameters())
        self.own_bytes = self.weight_bytes
        self.captures = 0  # they are Inductor's

    def start(self, case: Case) -> None:
        """A cache and a compilation for each case, as generate() would."""
        from transformers import StaticCache

        setup, config, device = self.setup, self.setup.model.config, self.setup.device
        self.cache: StaticCache | None = None
        forget(device)
        longest = setup.padded_len(case)
        cache = StaticCache(config=self.model.config, max_cache_len=longest)
        cache.early_initialization(
            case.batch, config.num_kv_heads, config.head_size, setup.dtype, device
        )
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.cache = cache
        cache_bytes = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
        self.own_bytes = self.weight_bytes + cache_bytes
        self.first_lens = torch.tensor(setup.first_lens(case), device=device)
        self.tokens = torch.zeros(case.batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.mask = torch.zeros(case.batch, 1, 1, longest, dtype=torch.bool, device=device)
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self.forward = torch.compile(self.model.forward, mode=mode)
        self.restart()
        self.launch(3)  # compiles, warms up and captures

    def restart(self) -> None:
        """The padding stays, the newer slots are hidden again."""
        slots = torch.arange(self.mask.shape[-1], device=self.mask.device)
        longest = self.first_lens.max()
        padding = (longest - self.first_lens)[:, None, None, None]
        self.mask.copy_((slots >= padding) & (slots < longest))
        self.positions.copy_(self.first_lens[:, None])
        self.slot.copy_(longest)
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(longest)

    def launch(self, steps: int) -> None:
        """The host prepares masks and positions beside the graph, as generate() does."""
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            self.mask.index_fill_(3, self.slot, True)
            logits = self.forward(
                input_ids=self.tokens,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
            ).logits
            self.tokens.copy_(logits[:, -1:].argmax(-1))
            self.positions.add_(1)
            self.slot.add_(1)


def hub_model_of(setup: Setup) -> nn.Module:
    """The hub's model of these sizes, with weights of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = setup.model.config
    hub_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(setup.dtype)
    try:
        with setup.device:
            return LlamaForCausalLM(hub_config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def index_put(setup: Setup) -> Paged:
    """The loop of the examples without write_kv."""
    other = with_attention(setup.model, IndexPutAttention)
    return paged(dataclasses.replace(setup, model=other))


def paged(setup: Setup) -> Paged:
    """The loop of the examples."""
    return Paged(setup, compile_step(setup.device, setup.options))


def eager(setup: Setup) -> Paged:
    """The same, not compiled; on a GPU still captured."""
    return Paged(setup, decode_step)


CONTENDERS: dict[str, Callable[[Setup], Contender]] = {
    "paged": paged,
    "index_put": index_put,
    "eager": eager,
    "dense": Dense,
    "transformers": Hub,
}
