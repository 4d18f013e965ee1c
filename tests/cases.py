"""One attention case: its sizes and options, and the inputs made from it.

Every slot that no sequence reaches holds NaN and every unused table entry a block id far out of
range, so that a kernel which reads what it should not cannot pass.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from paged_ops import reference

UNUSED_ENTRY = 2147480000
LAYOUTS = ("block_kv", "slot_kv", "kv_block", "hnd", "slice")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options; its repr names the test."""

    seq_lens: tuple[int, ...] = (1, 17, 40)
    query_lens: tuple[int, ...] | None = None  # None: decode, without query_start_loc
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    layout: str = "block_kv"
    padding: int = 0  # query rows after the last sequence's
    scale: float | None = None
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    scales: str = ""  # "", "tensor" or "head": of a float8 cache
    seed: int = 0

    def __str__(self) -> str:
        """The fields that differ from the default."""
        fields = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "-".join(f"{name}={value}".replace("torch.", "") for name, value in fields)


@dataclasses.dataclass
class Inputs:
    """Arguments of an attention operator."""

    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor | None
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.kv_cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
        )

    def to(self, device: torch.device | str) -> Inputs:
        def moved(value: Any) -> Any:
            return move(value, device) if isinstance(value, Tensor) else value

        return Inputs(
            *(moved(value) for value in self.args),
            {name: moved(value) for name, value in self.options.items()},
        )


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device with the same strides, and the same in the holes between them."""
    count = tensor.untyped_storage().size() // tensor.element_size()
    storage = tensor.as_strided((count,), (1,), 0).clone().to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def new_cache(
    layout: str,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """A cache full of NaN: [num_blocks, 2, block_size, num_kv_heads, head_size] in some storage."""

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan).to(dtype)

    if layout == "block_kv":
        return nan(num_blocks, 2, block_size, num_kv_heads, head_size)
    if layout == "slot_kv":
        return nan(num_blocks, block_size, 2, num_kv_heads, head_size).transpose(1, 2)
    if layout == "kv_block":
        return nan(2, num_blocks, block_size, num_kv_heads, head_size).transpose(0, 1)
    if layout == "hnd":
        return nan(num_blocks, 2, num_kv_heads, block_size, head_size).transpose(2, 3)
    if layout == "slice":  # one layer of an allocation for three
        return nan(num_blocks, 3, 2, block_size, num_kv_heads, head_size + 3)[:, 1, ..., 2:-1]
    raise ValueError(layout)


def fill(kv_cache: Tensor, block: int, count: int, generator: torch.Generator) -> None:
    """Put random keys and values into the first `count` slots of a block."""
    shape = kv_cache[block, :, :count].shape
    kv_cache[block, :, :count] = torch.randn(shape, generator=generator).to(kv_cache.dtype)


def make_table(case: Case, kv_cache: Tensor, generator: torch.Generator) -> Tensor:
    """A table of shuffled blocks, and the blocks filled up to each sequence's length."""
    free = torch.randperm(kv_cache.size(0), generator=generator).tolist()
    needed = [-(-seq_len // case.block_size) for seq_len in case.seq_lens]
    table = torch.full((len(needed), max(needed, default=0) + 2), UNUSED_ENTRY, dtype=torch.int32)
    for seq, seq_len in enumerate(case.seq_lens):
        for i in range(needed[seq]):
            table[seq, i] = block = free.pop()
            count = min(case.block_size, seq_len - i * case.block_size)
            fill(kv_cache, block, count, generator)
    return table


def make_query(case: Case, num_tokens: int, generator: torch.Generator) -> Tensor:
    """A query as a slice of a fused projection: not contiguous."""
    fused = torch.randn(
        num_tokens, case.num_heads + 2 * case.num_kv_heads, case.head_size, generator=generator
    )
    return fused.to(case.dtype)[:, : case.num_heads]


def make_options(case: Case, generator: torch.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {
        "scale": case.scale,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
    }
    if case.alibi:
        options["alibi_slopes"] = torch.rand(case.num_heads, generator=generator)
    if case.sinks:
        options["sinks"] = torch.randn(case.num_heads, generator=generator)
    if case.scales:
        count = 1 if case.scales == "tensor" else case.num_kv_heads
        options["k_scale"] = torch.rand(count, generator=generator) + 0.5
        options["v_scale"] = torch.rand(count, generator=generator) + 0.5
    return options


def make_inputs(case: Case) -> Inputs:
    """Random inputs on the CPU, the same for the same case."""
    generator = torch.Generator().manual_seed(case.seed)
    num_blocks = sum(-(-seq_len // case.block_size) for seq_len in case.seq_lens) + 3
    kv_cache = new_cache(
        case.layout,
        num_blocks,
        case.block_size,
        case.num_kv_heads,
        case.head_size,
        case.cache_dtype or case.dtype,
    )
    block_table = make_table(case, kv_cache, generator)
    query_start_loc = None
    num_tokens = len(case.seq_lens)
    if case.query_lens is not None:
        lens = torch.tensor((0, *case.query_lens), dtype=torch.int32)
        query_start_loc = lens.cumsum(0, dtype=torch.int32)
        num_tokens = sum(case.query_lens) + case.padding
    return Inputs(
        make_query(case, num_tokens, generator),
        kv_cache,
        block_table,
        torch.tensor(case.seq_lens, dtype=torch.int32),
        query_start_loc,
        make_options(case, generator),
    )


def expected(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Out and lse in float64."""
    return reference.attention_lse(*inputs.args, **inputs.options)


def random_case(seed: int) -> Case:
    """Any sizes with any options."""
    rng = random.Random(seed)
    num_kv_heads = rng.choice((1, 2, 3, 5, 8))
    decode = rng.random() < 0.4
    seq_lens = tuple(rng.choice((0, 1, rng.randrange(1, 300))) for _ in range(rng.randrange(1, 7)))
    query_lens = tuple(rng.choice((0, 1, rng.randrange(1, 40))) for _ in seq_lens)
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    float8 = rng.random() < 0.25
    return Case(
        seq_lens=seq_lens,
        query_lens=None if decode else query_lens,
        num_heads=num_kv_heads * rng.choice((1, 2, 3, 4, 7, 8)),
        num_kv_heads=num_kv_heads,
        head_size=rng.choice((1, 32, 64, 80, 96, 100, 112, 128, 192, 256)),
        block_size=rng.choice((1, 3, 8, 16, 64, 256)),
        dtype=dtype,
        cache_dtype=torch.float8_e4m3fn if float8 else None,
        layout=rng.choice(LAYOUTS),
        padding=0 if decode else rng.choice((0, 3)),
        scale=rng.choice((None, 0.05)),
        causal=rng.random() < 0.8,
        window=rng.choice((-1, -1, 1, 20, 1000)),
        softcap=rng.choice((0.0, 0.0, 5.0)),
        alibi=rng.random() < 0.2,
        sinks=rng.random() < 0.2,
        scales=rng.choice(("", "tensor", "head")) if float8 else "",
        seed=seed,
    )


def large_random_case(seed: int) -> Case:
    """Long sequences or many of them, with prompts and chunks of prompts among them."""
    most_elements, most_scores = 1 << 24, 1 << 25  # of all keys; of a sequence, in float64
    small = random_case(seed)
    rng = random.Random(-seed)
    num_seqs = rng.choice((1, 2, 5, 17, 64, 150))
    keys_each = min(40_000, most_elements // (small.num_kv_heads * small.head_size)) // num_seqs
    seq_lens = tuple(round(max(keys_each, 2) ** rng.uniform(0.5, 1.0)) for _ in range(num_seqs))
    query_lens = tuple(
        min(
            rng.choice((1, 1, rng.randrange(17), round(seq_len ** rng.random()), seq_len)),
            most_scores // (seq_len * small.num_heads),
        )
        for seq_len in seq_lens
    )
    return dataclasses.replace(
        small, seq_lens=seq_lens, query_lens=None if small.query_lens is None else query_lens
    )
