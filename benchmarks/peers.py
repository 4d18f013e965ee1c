"""The other kernels that are measured beside ours, each called as its own project calls it.

Each function here prepares one batch and returns the call that is timed. Converting the cache to a
peer's own layout and planning are preparation: they are not timed. What a peer cannot do it says by
raising ``Unsupported``; a peer that is not installed raises too, and becomes a row that says so.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.attention.bias
from cases import FLOAT8, Batch, BlockPairs, Rows
from torch import Tensor

import paged_ops  # noqa: F401  (registers the operators)

Attend = Callable[[], Tensor]
Write = Callable[[], object]


class Unsupported(Exception):
    """The peer has no kernel for this case."""


@dataclass(frozen=True)
class Peer:
    """A kernel that is compared with, and how its call is prepared."""

    name: str
    prepare: Callable[[Batch], Attend]
    compared: bool = True
    """False: only shown. It reads no cache of blocks, or it is this project's."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


# ---- this project ----


def ours(batch: Batch, *, batch_invariant: bool = False) -> Attend:
    attend = torch.ops.paged.attention_out.default
    start = None if batch.case.decode else batch.query_start_loc

    def call() -> Tensor:
        attend(
            *(batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, start),
            batch_invariant=batch_invariant,
            out=batch.out,
        )
        return batch.out

    return call


# ---- FlashAttention-3 (Shah et al., 2024), in vLLM's build or its own ----


def load_vllm(folder: Path | None) -> None:
    """Register the operators in a vLLM wheel's libraries, without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    if folder is None and spec is not None and spec.origin:
        folder = Path(spec.origin).parent
    if folder is None:
        return
    for name in ("_C.abi3.so", "_vllm_fa3_C.abi3.so"):
        for library in folder.rglob(name):
            try:
                torch.ops.load_library(library)
            except OSError as error:
                print(f"{library}: {error.__cause__ or error}")


def flash_attention_3(batch: Batch, *, planned: bool = False) -> Attend:
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        return flash_attention_3_of_vllm(batch, planned)
    require(importlib.util.find_spec("flash_attn_interface") is not None, "not installed")
    require(not planned, "planned by vLLM's build only")
    from flash_attn_interface import flash_attn_with_kvcache

    key, value = batch.kv_cache.unbind(1)
    query, scales = float8_query(batch)
    names = ("q_descale", "k_descale", "v_descale")
    return functools.partial(
        flash_attn_with_kvcache,
        query,
        key,
        value,
        cache_seqlens=batch.seq_lens,
        page_table=batch.block_table,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=max(batch.case.query_lens),
        causal=True,
        **dict(zip(names, scales, strict=True)),
    )


def float8_query(batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """FlashAttention-3 wants a float8 query with a float8 cache, and scales of each sequence."""
    if batch.kv_cache.dtype != FLOAT8:
        return batch.query, (None,) * 3
    scales = batch.one.repeat(len(batch.case.seq_lens), batch.case.num_kv_heads)
    return batch.query.to(FLOAT8), (scales,) * 3


def flash_attention_3_of_vllm(batch: Batch, planned: bool) -> Attend:
    """In vLLM the plan is made once for all layers of a step; without it, each call makes its own.

    Arguments in the order of ``vllm/vllm_flash_attn/flash_attn_interface.py`` of vLLM 0.20.
    """
    case, none = batch.case, (None,)
    key, value = batch.kv_cache.unbind(1)
    query, scales = float8_query(batch)
    longest_query, longest = max(case.query_lens), max(case.seq_lens)
    plan = flash_attention_3_plan(batch, query.dtype) if planned else None
    forward = torch.ops._vllm_fa3_C.fwd.default
    arguments = (
        *(query, key, value, *none * 3, batch.out, batch.query_start_loc, *none * 3),
        *(batch.seq_lens, longest_query, longest, batch.block_table, *none * 5, *scales),
        *(case.head_size**-0.5, True, -1, -1, 0.0, True, plan, 0, None, 0, None, 1, 0, None),
    )
    return lambda: forward(*arguments)[0]


def flash_attention_3_plan(batch: Batch, dtype: torch.dtype) -> Tensor:
    case = batch.case
    return torch.ops._vllm_fa3_C.get_scheduler_metadata(
        *(len(case.seq_lens), max(case.query_lens), max(case.seq_lens)),
        *(case.num_heads, case.num_kv_heads, case.head_size, case.head_size, dtype),
        *(batch.seq_lens, batch.query_start_loc, None, None, None, None, case.block_size, 0),
        *(True, -1, -1, False, 0, None, 0),
    )


# ---- vLLM's paged_attention_v1 and v2 (Kwon et al., 2023) ----


def vllm_arguments(batch: Batch) -> tuple[object, ...]:
    case = batch.case
    require(case.decode, "decode only")
    require(case.block_size in (8, 16, 32), "block sizes 8, 16 and 32 only")
    key, value = batch.lane_cache
    float8 = key.dtype == FLOAT8
    if float8:
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    return (
        *(batch.query, key, value, case.num_kv_heads, case.head_size**-0.5, batch.block_table),
        *(batch.seq_lens, case.block_size, max(case.seq_lens), None, "fp8" if float8 else "auto"),
        *(batch.one, batch.one, 0, 0, 0, 64, 0),
    )


def vllm_v1(batch: Batch) -> Attend:
    require(hasattr(torch.ops._C, "paged_attention_v1"), "not installed")
    require(max(batch.case.seq_lens) <= 32768, "keeps all scores in shared memory")
    attend = torch.ops._C.paged_attention_v1.default
    arguments = (batch.out, *vllm_arguments(batch))

    def call() -> Tensor:
        attend(*arguments)
        return batch.out

    return call


def vllm_v2(batch: Batch) -> Attend:
    require(hasattr(torch.ops._C, "paged_attention_v2"), "not installed")
    attend = torch.ops._C.paged_attention_v2.default
    parts = -(-max(batch.case.seq_lens) // 512)
    shape = (*batch.query.shape[:2], parts)
    sums, largest = torch.empty(2, *shape, device=batch.device)
    partial = torch.empty(*shape, batch.case.head_size, dtype=batch.out.dtype, device=batch.device)
    arguments = (batch.out, sums, largest, partial, *vllm_arguments(batch))

    def call() -> Tensor:
        attend(*arguments)
        return batch.out

    return call


# ---- vLLM's attention for CPUs ----


def vllm_cpu(batch: Batch) -> Attend:
    """With AMX or, where there is none, AVX-512, in the block size that it is fastest with: 32.

    The cache is converted to its own layout and the call planned before, as its backend does once
    for all layers of a step.
    """
    case, plan = batch.case, ("amx" if torch.cpu._init_amx() else "vec")
    require(hasattr(torch.ops._C, "cpu_attention_with_kv_cache"), "not installed")
    require(case.cache_dtype is None, "measured on a cache of the query's dtype only")
    block_size = 32
    counts = [-(-seq_len // block_size) for seq_len in case.seq_lens]
    blocks = list(torch.randperm(sum(counts)).int().split(counts))
    table = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True)
    shape = (sum(counts), case.num_kv_heads, 2 * block_size, case.head_size)
    caches = torch.zeros(shape, dtype=case.dtype).chunk(2, dim=2)
    for sequence, seq_len in enumerate(case.seq_lens):
        key, value = batch.gather(slice(sequence, sequence + 1), seq_len)
        tokens = torch.arange(seq_len)
        slots = table[sequence].long()[tokens // block_size] * block_size + tokens % block_size
        rows = (part[0].transpose(0, 1).contiguous() for part in (key, value))
        torch.ops._C.cpu_attn_reshape_and_cache(*rows, *caches, slots, plan)
    schedule = torch.ops._C.get_scheduler_metadata(
        *(len(case.seq_lens), case.num_heads, case.num_kv_heads, case.head_size, batch.seq_lens),
        *(case.dtype, batch.query_start_loc, True, -1, plan, True, None),
    )
    attend = torch.ops._C.cpu_attention_with_kv_cache.default
    arguments = (
        *(batch.query, *caches, batch.out, batch.query_start_loc, batch.seq_lens),
        *(case.head_size**-0.5, True, None, -1, table, 0.0, schedule, None, None),
    )

    def call() -> Tensor:
        attend(*arguments)
        return batch.out

    return call


# ---- FlashInfer (Ye et al., 2025) ----


@functools.cache
def flashinfer_workspace(device: torch.device) -> Tensor:
    return torch.zeros(2**29, dtype=torch.uint8, device=device)


def flashinfer_table(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The block table as FlashInfer has it: counts, ids in a row, tokens in the last blocks."""
    size = batch.case.block_size
    lens = torch.tensor(batch.case.seq_lens)
    counts = -(-lens // size)
    table = batch.block_table.cpu()
    ids = torch.cat([row[:count] for row, count in zip(table, counts.tolist(), strict=True)])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    last = lens - (counts - 1) * size
    return ends.int().to(batch.device), ids.to(batch.device), last.int().to(batch.device)


def flashinfer_decode(batch: Batch, *, tensor_cores: bool) -> Attend:
    require(importlib.util.find_spec("flashinfer") is not None, "not installed")
    require(batch.case.decode, "decode only")
    import flashinfer

    case, cache = batch.case, batch.kv_cache
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        flashinfer_workspace(batch.device),
        "NHD",
        use_tensor_cores=tensor_cores,
        backend="fa2" if tensor_cores else "auto",
    )
    wrapper.plan(
        *flashinfer_table(batch),
        *(case.num_heads, case.num_kv_heads, case.head_size, case.block_size),
        q_data_type=case.dtype,
        kv_data_type=cache.dtype,
    )
    return lambda: wrapper.run(batch.query, cache, out=batch.out)


def flashinfer_prefill(batch: Batch) -> Attend:
    require(importlib.util.find_spec("flashinfer") is not None, "not installed")
    require(not batch.case.decode, "its decode wrappers are measured")
    import flashinfer

    case, cache = batch.case, batch.kv_cache
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        flashinfer_workspace(batch.device), "NHD", backend="fa2"
    )
    wrapper.plan(
        batch.query_start_loc,
        *flashinfer_table(batch),
        *(case.num_heads, case.num_kv_heads, case.head_size, case.block_size),
        causal=True,
        q_data_type=case.dtype,
        kv_data_type=cache.dtype,
    )
    return lambda: wrapper.run(batch.query, cache, out=batch.out)


# ---- PyTorch's own ----

sdpa = torch.nn.functional.scaled_dot_product_attention


def mask_of(query_len: int, seq_len: int, device: torch.device) -> dict[str, object]:
    """The causal mask, aligned at the end, in the form that ``sdpa`` is fastest with."""
    if query_len == 1:
        return {}
    if query_len == seq_len:
        return {"is_causal": True}
    if device.type == "cuda":
        return {"attn_mask": torch.nn.attention.bias.causal_lower_right(query_len, seq_len)}
    mask = torch.ones(query_len, seq_len, dtype=torch.bool, device=device)
    return {"attn_mask": mask.tril(seq_len - query_len)}


def query_parts(batch: Batch) -> list[Tensor]:
    """``[sequences, num_heads, query_len, head_size]`` for each pair of ``batch.dense``."""
    if batch.case.uniform:
        return [batch.query.unflatten(0, (len(batch.case.seq_lens), -1)).transpose(1, 2)]
    return [part.transpose(0, 1)[None] for part in batch.query.split(list(batch.case.query_lens))]


def rows_of(parts: list[Tensor]) -> Tensor:
    """What attention gave for ``query_parts``, as rows of the query."""
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def sdpa_dense(batch: Batch) -> Attend:
    """On keys and values that lie without blocks, in one call if all lengths are equal."""
    case = batch.case
    require(case.cache_dtype is None, "no float8 cache")
    masks = [
        mask_of(query.size(2), key.size(2), batch.device)
        for query, (key, _) in zip(query_parts(batch), batch.dense, strict=True)
    ]
    grouped = case.num_heads != case.num_kv_heads
    work = list(zip(query_parts(batch), batch.dense, masks, strict=True))
    return lambda: rows_of(
        [sdpa(query, *kv, enable_gqa=grouped, **mask) for query, kv, mask in work]
    )


def sdpa_gather(batch: Batch) -> Attend:
    """The blocks are gathered first, as code without a paged kernel does it."""
    case = batch.case
    require(case.cache_dtype is None, "no float8 cache")
    grouped = case.num_heads != case.num_kv_heads
    if case.uniform:
        groups = [(slice(None), case.seq_lens[0])]
    else:
        groups = [(slice(s, s + 1), seq_len) for s, seq_len in enumerate(case.seq_lens)]
    queries = query_parts(batch)
    masks = [
        mask_of(query.size(2), seq_len, batch.device)
        for query, (_, seq_len) in zip(queries, groups, strict=True)
    ]
    return lambda: rows_of(
        [
            sdpa(query, *batch.gather(*group), enable_gqa=grouped, **mask)
            for query, group, mask in zip(queries, groups, masks, strict=True)
        ]
    )


def flex_attention(batch: Batch) -> Attend:
    """Compiled, on keys and values that lie without blocks."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    case = batch.case
    require(case.uniform, "measured on equal lengths only")
    require(case.cache_dtype is None, "no float8 cache")
    (key, value), (query,) = batch.dense[0], query_parts(batch)
    query_len, seq_len = query.size(2), key.size(2)
    mask = None
    if query_len > 1:

        def sees(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return column <= row + (seq_len - query_len)

        mask = create_block_mask(sees, None, None, query_len, seq_len, device=batch.device.type)
    compiled = torch.compile(attend, dynamic=False, fullgraph=True)
    grouped = case.num_heads != case.num_kv_heads
    return lambda: rows_of([compiled(query, key, value, block_mask=mask, enable_gqa=grouped)])


FLEX = Peer("FlexAttention dense", flex_attention, compared=False)
SDPA = Peer("SDPA dense", sdpa_dense, compared=False)
BATCH_INVARIANT = Peer(
    "paged_ops batch-invariant", functools.partial(ours, batch_invariant=True), compared=False
)
CUDA_PEERS = [
    BATCH_INVARIANT,
    Peer("FlashAttention-3", flash_attention_3),
    Peer("FlashAttention-3 planned", functools.partial(flash_attention_3, planned=True)),
    Peer("FlashInfer tensor cores", functools.partial(flashinfer_decode, tensor_cores=True)),
    Peer("FlashInfer CUDA cores", functools.partial(flashinfer_decode, tensor_cores=False)),
    Peer("FlashInfer fa2 prefill", flashinfer_prefill),
    Peer("vLLM v1", vllm_v1),
    Peer("vLLM v2", vllm_v2),
    SDPA,
]
CPU_PEERS = [Peer("SDPA gather", sdpa_gather), Peer("vLLM", vllm_cpu), SDPA]


# ---- writing ----


def write_ours(rows: Rows) -> Write:
    write = torch.ops.paged.write_kv.default
    return lambda: write(rows.key, rows.value, rows.kv_cache, rows.slot_mapping)


def write_vllm(rows: Rows) -> Write:
    require(hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"), "not installed")
    write = torch.ops._C_cache_ops.reshape_and_cache_flash.default
    key_cache, value_cache = rows.kv_cache.unbind(1)
    return lambda: write(
        *(rows.key, rows.value, key_cache, value_cache, rows.slot_mapping, "auto"),
        *(rows.one, rows.one),
    )


def write_index(rows: Rows) -> Write:
    """PyTorch's indexed assignment."""
    size = rows.case.block_size
    blocks, offsets = rows.slot_mapping // size, rows.slot_mapping % size

    def call() -> None:
        rows.kv_cache[blocks, 0, offsets] = rows.key
        rows.kv_cache[blocks, 1, offsets] = rows.value

    return call


def written_error(rows: Rows, call: Write) -> float:
    """The share of the elements that a write leaves wrong."""
    blocks, offsets = (
        rows.slot_mapping // rows.case.block_size,
        rows.slot_mapping % rows.case.block_size,
    )
    rows.kv_cache.zero_()
    call()
    wrong = (rows.kv_cache[blocks, 0, offsets] != rows.key).float().mean()
    return float(wrong + (rows.kv_cache[blocks, 1, offsets] != rows.value).float().mean())


def copy_ours(pairs: BlockPairs) -> Write:
    copy = torch.ops.paged.copy_blocks.default
    return lambda: copy(pairs.kv_cache, pairs.block_pairs)


def copy_index(pairs: BlockPairs) -> Write:
    """PyTorch's indexed assignment, which gathers the sources first."""
    sources, destinations = pairs.block_pairs.unbind(1)

    def call() -> None:
        pairs.kv_cache[destinations] = pairs.kv_cache[sources]

    return call


def copied_error(pairs: BlockPairs, call: Write) -> float:
    """The share of the elements that a copy leaves wrong."""
    sources, destinations = pairs.block_pairs.unbind(1)
    pairs.kv_cache[destinations] = 0
    call()
    return float((pairs.kv_cache[destinations] != pairs.kv_cache[sources]).float().mean())


WRITERS: dict[str, Callable[[Rows], Write]] = {
    "paged_ops": write_ours,
    "vLLM reshape_and_cache_flash": write_vllm,
    "indexed assignment": write_index,
}
COPIERS: dict[str, Callable[[BlockPairs], Write]] = {
    "paged_ops": copy_ours,
    "indexed assignment": copy_index,
}


def attention_peers(device: torch.device, flex: bool) -> list[Peer]:
    peers = CUDA_PEERS if device.type == "cuda" else CPU_PEERS
    return [*peers, FLEX] if flex else peers
