"""The batches that are measured, and their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOPS_PER_BYTE = 150  # about what a GPU multiplies in the time in which it reads one


@dataclass(frozen=True)
class Case:
    """A batch: the lengths of its sequences and the shape of the model's attention."""

    name: str
    seq_lens: tuple[int, ...]
    query_len: int | tuple[int, ...] = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    measures: Literal["attention", "write", "copy"] = "attention"
    """Or the writing of its sequences to the cache, or the copying of their blocks to others."""

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Tokens of each sequence that are new."""
        if isinstance(self.query_len, tuple):
            return self.query_len
        return (self.query_len,) * len(self.seq_lens)

    @property
    def decode(self) -> bool:
        """Whether each sequence has one new token."""
        return set(self.query_lens) == {1}

    @property
    def prefill(self) -> bool:
        """Whether it has so many new tokens that arithmetic takes longer than reading."""
        return self.flops > FLOPS_PER_BYTE * self.kv_bytes

    @property
    def uniform(self) -> bool:
        """Whether all sequences are alike, so that dense tensors can hold them."""
        return len(set(self.seq_lens)) == 1 and len(set(self.query_lens)) == 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the batch."""
        element = (self.cache_dtype or self.dtype).itemsize
        return 2 * sum(self.seq_lens) * self.num_kv_heads * self.head_size * element

    @property
    def flops(self) -> float:
        """Of the two matrix products of causal attention, the masked part not counted."""
        if self.measures != "attention":
            return 0.0
        pairs = sum(
            query_len * (seq_len - (query_len - 1) / 2)
            for query_len, seq_len in zip(self.query_lens, self.seq_lens, strict=True)
        )
        return 4.0 * pairs * self.num_heads * self.head_size


@dataclass
class Batch:
    """The tensors of one call. Block tables are shuffled, keys, values and queries random."""

    case: Case
    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    out: Tensor
    one: Tensor = field(init=False)
    """A scale that changes nothing."""

    def __post_init__(self) -> None:
        self.one = torch.ones(1, device=self.query.device)

    @property
    def device(self) -> torch.device:
        """Where all the tensors are."""
        return self.query.device

    @cached_property
    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[sequences, num_kv_heads, seq_len, head_size]``, without blocks.

        One pair for all sequences where their lengths are equal, else one pair for each.
        """
        if self.case.uniform:
            return [self.gather(slice(None), self.case.seq_lens[0])]
        return [self.gather(slice(s, s + 1), n) for s, n in enumerate(self.case.seq_lens)]

    def gather(self, sequences: slice, seq_len: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of some sequences of one length."""
        table = self.block_table[sequences, : -(-seq_len // self.case.block_size)].long()
        key, value = (
            self.kv_cache[:, half][table].flatten(1, 2)[:, :seq_len].transpose(1, 2).contiguous()
            for half in (0, 1)
        )
        return key, value

    @cached_property
    def lane_cache(self) -> tuple[Tensor, Tensor]:
        """The layout of vLLM's first kernels: a key's 16-byte lanes apart, values transposed."""
        key, value = (half.permute(0, 2, 3, 1) for half in self.kv_cache.unbind(1))
        lane = 16 // self.kv_cache.element_size()
        key = key.unflatten(2, (-1, lane)).transpose(3, 4)
        return key.contiguous(), value.contiguous()


@dataclass
class Rows:
    """The tensors of one write of new tokens into a cache."""

    case: Case
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    slot_mapping: Tensor
    one: Tensor


@dataclass
class BlockPairs:
    """The tensors of one copy of blocks: each block of a cache is a source or a destination."""

    case: Case
    kv_cache: Tensor
    block_pairs: Tensor


def random_(tensor: Tensor) -> Tensor:
    """Fill with normal values, a piece at a time where a dtype needs a copy."""
    if tensor.dtype != FLOAT8:
        return tensor.normal_()
    for piece in tensor.split(max(1, 2**28 // tensor[0].numel())):
        piece.copy_(torch.randn(piece.shape, dtype=torch.bfloat16, device=tensor.device))
    return tensor


def make_cache(case: Case, num_blocks: int, device: torch.device) -> Tensor:
    shape = (num_blocks, 2, case.block_size, case.num_kv_heads, case.head_size)
    return random_(torch.empty(shape, dtype=case.cache_dtype or case.dtype, device=device))


def make_batch(case: Case, device: torch.device) -> Batch:
    counts = [-(-seq_len // case.block_size) for seq_len in case.seq_lens]
    blocks = torch.randperm(sum(counts)).int().split(counts)
    block_table = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    ends = torch.tensor((0, *case.query_lens)).cumsum(0, dtype=torch.int32)
    num_tokens = sum(case.query_lens)
    shape = (num_tokens, case.num_heads, case.head_size)
    query = torch.randn(shape, dtype=case.dtype, device=device)
    return Batch(
        case,
        query,
        make_cache(case, sum(counts), device),
        block_table.to(device),
        torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        ends.to(device),
        torch.empty_like(query),
    )


def make_rows(case: Case, device: torch.device) -> Rows:
    num_tokens = sum(case.seq_lens)
    num_blocks = -(-num_tokens // case.block_size)
    key, value = torch.randn(
        2, num_tokens, case.num_kv_heads, case.head_size, dtype=case.dtype, device=device
    )
    slots = torch.arange(num_blocks * case.block_size).view(num_blocks, -1)
    slots = slots[torch.randperm(num_blocks)].flatten()[:num_tokens]
    kv_cache = make_cache(case, num_blocks, device)
    return Rows(case, key, value, kv_cache, slots.to(device), torch.ones(1, device=device))


def make_pairs(case: Case, device: torch.device) -> BlockPairs:
    num_pairs = sum(case.seq_lens) // case.block_size
    block_pairs = torch.randperm(2 * num_pairs).view(num_pairs, 2)
    return BlockPairs(case, make_cache(case, 2 * num_pairs, device), block_pairs.to(device))


def expected_rows(batch: Batch, sequence: int, count: int = 64) -> tuple[slice, Tensor]:
    """The last rows of a sequence, at most so many, and their attention in float32."""
    case = batch.case
    seq_len, query_len = case.seq_lens[sequence], case.query_lens[sequence]
    end = sum(case.query_lens[: sequence + 1])
    rows = slice(end - min(query_len, count), end)
    key, value = batch.gather(slice(sequence, sequence + 1), seq_len)
    query = batch.query[rows].float().transpose(0, 1)
    query = query.unflatten(0, (case.num_kv_heads, -1))
    scores = query @ key[0].float().transpose(1, 2)[:, None] / math.sqrt(case.head_size)
    position = torch.arange(seq_len - query.size(2), seq_len, device=batch.device)
    masked = torch.arange(seq_len, device=batch.device) > position[:, None]
    out = scores.masked_fill(masked, -math.inf).softmax(-1) @ value[0].float()[:, None]
    return rows, out.flatten(0, 1).transpose(0, 1)


def relative_error(batch: Batch, out: Tensor) -> float:
    """The largest relative L2 error among the first, the last and the longest sequence."""
    longest = max(range(len(batch.case.seq_lens)), key=batch.case.seq_lens.__getitem__)
    errors = []
    for sequence in {0, longest, len(batch.case.seq_lens) - 1}:
        rows, expected = expected_rows(batch, sequence)
        got = out.reshape(batch.query.shape)[rows].float()
        errors.append(float((got - expected).norm() / expected.norm()))
    return math.nan if any(math.isnan(each) for each in errors) else max(errors)


def lognormal(count: int, mean: int) -> tuple[int, ...]:
    """Lengths as users write them: most short, a few very long."""
    sizes = torch.randn(count, generator=torch.Generator().manual_seed(1)).exp()
    return tuple(max(1, int(size)) for size in sizes / sizes.mean() * mean)


def cuda_cases() -> list[Case]:
    ragged = lognormal(128, 2048)
    b64 = Case("b64_ctx4k", (4096,) * 64)
    return [
        b64,
        Case("b256_ctx1k", (1024,) * 256),
        Case("b128_ctx8k", (8192,) * 128),
        Case("mha_b16_ctx4k", (4096,) * 16, num_kv_heads=32),
        replace(b64, name="64/8_b64_ctx4k", num_heads=64),
        replace(b64, name="64/4_b64_ctx4k", num_heads=64, num_kv_heads=4),
        *(Case(f"lognormal_block{size}", ragged, block_size=size) for size in (16, 64, 256)),
        Case("skew_128k_63x512", (131072,) + (512,) * 63),
        Case("b8_ctx2k", (2048,) * 8),
        Case("b1_ctx8k", (8192,)),
        Case("b1_ctx128k", (131072,)),
        replace(b64, name="d64_b64_ctx4k", head_size=64),
        replace(b64, name="d256_b64_ctx4k", head_size=256, num_heads=16, num_kv_heads=4),
        replace(b64, name="q4_b64_ctx4k", query_len=4),
        Case("8/1_b1_ctx128k", (131072,), num_heads=8, num_kv_heads=1),
        Case("fp8_64/8_b128_ctx2k", (2048,) * 128, num_heads=64, cache_dtype=FLOAT8),
        Case("prefill_1x16k", (16384,), 16384),
        Case("prefill_4x2k", (2048,) * 4, 2048),
        Case("chunks_8x512_on_8k", (8192,) * 8, 512),
        Case("mixed_63x4k_1x2k", (4096,) * 63 + (2048,), (1,) * 63 + (2048,)),
        Case("write_kv_8192", (8192,), measures="write"),
        Case("copy_512_blocks", (8192,), measures="copy"),
    ]


def cpu_cases() -> list[Case]:
    return [
        Case("b1_ctx8k", (8192,)),
        Case("b4_ctx4k", (4096,) * 4),
        Case("b16_ctx1k", (1024,) * 16),
        Case("lognormal_b32", lognormal(32, 1024)),
        Case("mha_b4_ctx2k", (2048,) * 4, num_kv_heads=32),
        Case("64/8_b4_ctx4k", (4096,) * 4, num_heads=64),
        Case("fp8_b4_ctx4k", (4096,) * 4, cache_dtype=FLOAT8),
        Case("fp8_mha_b4_ctx2k", (2048,) * 4, num_kv_heads=32, cache_dtype=FLOAT8),
        Case("prefill_1x2k", (2048,), 2048),
        Case("chunk_256_on_2k", (2048,), 256),
        Case("write_kv_2048", (2048,), measures="write"),
        Case("copy_512_blocks", (8192,), measures="copy"),
    ]
