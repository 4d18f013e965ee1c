"""What each operator returns, without running it: one fake each, in the order of ``ops.py``.

They are written in Python because a C++ Meta kernel sees plain integers and would specialise every
size. Only what a traced graph depends on is checked here; the kernels check the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check_attention(query: Tensor, kv_cache: Tensor) -> None:
    torch._check(query.dim() == 3, lambda: f"query must have 3 dimensions, got {query.dim()}")
    torch._check(
        kv_cache.dim() == 5, lambda: f"kv_cache must have 5 dimensions, got {kv_cache.dim()}"
    )
    torch._check(
        query.size(2) == kv_cache.size(4),
        lambda: f"kv_cache must have head_size={query.size(2)} like query, got {kv_cache.size(4)}",
    )


def _new_lse(query: Tensor) -> Tensor:
    return query.new_empty((query.size(0), query.size(1)), dtype=torch.float32)


@torch.library.register_fake("paged::attention")
def _attention(query: Tensor, kv_cache: Tensor, *args: object, **kwargs: object) -> Tensor:
    _check_attention(query, kv_cache)
    return query.new_empty(query.shape)


@torch.library.register_fake("paged::attention_lse")
def _attention_lse(
    query: Tensor, kv_cache: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    _check_attention(query, kv_cache)
    return query.new_empty(query.shape), _new_lse(query)


@torch.library.register_fake("paged::attention_out")
def _attention_out(
    query: Tensor, kv_cache: Tensor, *args: object, out: Tensor, **kwargs: object
) -> None:
    _check_attention(query, kv_cache)
    torch._check(
        out.dim() == 3, lambda: f"out must have the 3 dimensions of query, got {out.dim()}"
    )


@torch.library.register_fake("paged::write_kv")
def _write_kv(
    key: Tensor, value: Tensor, kv_cache: Tensor, *args: object, **kwargs: object
) -> None:
    _check_attention(key, kv_cache)


@torch.library.register_fake("paged::copy_blocks")
def _copy_blocks(kv_cache: Tensor, block_pairs: Tensor) -> None:
    torch._check(
        block_pairs.dim() == 2,
        lambda: f"block_pairs must have 2 dimensions, got {block_pairs.dim()}",
    )


@torch.library.register_fake("paged::merge_states")
def _merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), _new_lse(out_a)


@torch.library.register_fake("paged::paged_attention_v1")
def _paged_attention_v1(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
) -> None:
    torch._check(out.dim() == 3, lambda: f"out must have 3 dimensions, got {out.dim()}")
