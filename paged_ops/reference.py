"""What each operator means, in plain PyTorch and float64, for the tests and for the reader.

Slow and simple: one loop over the sequences, one dense softmax each. Arguments as in ``ops.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(kv_cache: Tensor, block_row: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence out of its blocks, float64 ``[seq_len, num_kv_heads, head_size]``."""
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
