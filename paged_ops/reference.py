"""What each operator means, in plain PyTorch and float64, for the tests and for the reader.

Slow and simple: one loop over the sequences, one dense softmax each. Arguments as in ``ops.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(kv_cache: Tensor, block_row: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence out of its blocks, float64 ``[seq_len, num_kv_heads, head_size]``."""
    block_size = kv_cache.size(2)
    num_blocks = -(-seq_len // block_size)
    blocks = kv_cache[block_row[:num_blocks].long()].double()
    key, value = blocks.transpose(0, 1).flatten(1, 2)[:, :seq_len].unbind()
    return key, value


def visible(query_len: int, seq_len: int, causal: bool, window: int) -> Tensor:
    """Which keys the tokens at the end of a sequence see, bool ``[query_len, seq_len]``."""
    position = torch.arange(seq_len - query_len, seq_len)[:, None]
    key = torch.arange(seq_len)
    mask = (position >= 0).expand(query_len, seq_len)
    if causal:
        mask = mask & (key <= position)
    return mask & (key > position - window) if window != -1 else mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence over its dense K and V: out ``[q, H, D]`` and lse ``[q, H]``."""
    group_size = query.size(1) // key.size(1)
    query_len, seq_len = query.size(0), key.size(0)
    scores = scale * torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group_size, 1))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        position = torch.arange(seq_len - query_len, seq_len)[:, None]
        distance = (position - torch.arange(seq_len)).abs()
        scores = scores - alibi_slopes.double()[:, None, None] * distance
    mask = visible(query_len, seq_len, causal, window)
    scores = scores.masked_fill(~mask, -torch.inf)
    sees_some = mask.any(1)
    lse = scores.logsumexp(2)
    if sinks is not None:
        lse = torch.where(sees_some, torch.logaddexp(lse, sinks.double()[:, None]), lse)
    weights = torch.where(scores == -torch.inf, 0.0, torch.exp(scores - lse[..., None]))
    out = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group_size, 1))
    return out, lse.transpose(0, 1)


def attention_lse(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops.attention_lse`` on CPU tensors, in float64."""
    num_seqs = block_table.size(0)
    starts = torch.arange(num_seqs + 1) if query_start_loc is None else query_start_loc
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    for seq in range(num_seqs):
        rows = slice(int(starts[seq]), int(starts[seq + 1]))
        seq_len = int(seq_lens[seq])
        if seq_len == 0 or rows.start == rows.stop:
            continue
        key, value = gather_kv(kv_cache, block_table[seq], seq_len)
        out[rows], lse[rows] = attend(
            query[rows].double(),
            key if k_scale is None else key * k_scale.double().view(1, -1, 1),
            value if v_scale is None else value * v_scale.double().view(1, -1, 1),
            scale=query.size(2) ** -0.5 if scale is None else scale,
            causal=causal,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
    return out, lse


def write_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """``ops.write_kv``, token by token."""
    block_size = kv_cache.size(2)
    largest = torch.finfo(kv_cache.dtype).max
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot == -1:
            continue
        block, offset = divmod(slot, block_size)
        for half, (new, scale) in enumerate(((key, k_scale), (value, v_scale))):
            row = new[token]
            if kv_cache.dtype == torch.float8_e4m3fn:
                row = row.float() / (1.0 if scale is None else scale.view(-1, 1))
                row = row.clamp(-largest, largest)
            kv_cache[block, half, offset] = row.to(kv_cache.dtype)


def copy_blocks(kv_cache: Tensor, block_pairs: Tensor) -> None:
    """``ops.copy_blocks``."""
    for source, destination in block_pairs.tolist():
        kv_cache[destination] = kv_cache[source]


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """``ops.merge_states``, in float64."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    out = torch.zeros(out_a.shape, dtype=torch.float64)
    for side_out, side_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(side_lse.double() - lse)[..., None]
        out += torch.where(side_lse[..., None] == -torch.inf, 0.0, weight * side_out.double())
    return out, lse


def paged_attention_v1(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor
) -> Tensor:
    """``ops.paged_attention_v1``, returned in float64."""
    kv_cache = torch.stack((key_cache, value_cache), 1)
    return attention_lse(query, kv_cache, block_table, context_lens)[0]
