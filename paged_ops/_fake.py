"""What each operator returns, without running it: one fake each, in the order of ``ops.py``.

They are written in Python because a C++ Meta kernel sees plain integers and would specialise every
size. Only what a traced graph depends on is checked here, and the devices: a call with one tensor
on the meta device ends here even if the others hold data. The kernels check the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _check_devices(op: str, **arguments: object) -> None:
    """All are on the device of the first; those that are not tensors are not given."""
    tensors = {name: each for name, each in arguments.items() if isinstance(each, Tensor)}
    anchor_name, anchor = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != anchor.device:
            raise RuntimeError(
                f"paged::{op}: {name} must be on {anchor.device} like {anchor_name}, "
                f"got {tensor.device}"
            )


def _check_shapes(query: Tensor, kv_cache: Tensor) -> None:
    torch._check(query.dim() == 3, lambda: f"query must have 3 dimensions, got {query.dim()}")
    torch._check(
        kv_cache.dim() == 5, lambda: f"kv_cache must have 5 dimensions, got {kv_cache.dim()}"
    )
    torch._check(
        query.size(2) == kv_cache.size(4),
        lambda: f"kv_cache must have head_size={query.size(2)} like query, got {kv_cache.size(4)}",
    )


def _check_attention(
    op: str,
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    **options: object,
) -> None:
    _check_devices(
        op,
        query=query,
        kv_cache=kv_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        **options,
    )
    _check_shapes(query, kv_cache)


def _new_lse(query: Tensor) -> Tensor:
    return query.new_empty((query.size(0), query.size(1)), dtype=torch.float32)


@torch.library.register_fake("paged::attention")
def _attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
    _check_attention("attention", query, *args, **options)
    return query.new_empty(query.shape)


@torch.library.register_fake("paged::attention_lse")
def _attention_lse(query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check_attention("attention_lse", query, *args, **options)
    return query.new_empty(query.shape), _new_lse(query)


@torch.library.register_fake("paged::attention_out")
def _attention_out(query: Tensor, *args: Any, out: Tensor, **options: Any) -> None:
    _check_attention("attention_out", query, *args, out=out, **options)
    torch._check(
        out.dim() == 3, lambda: f"out must have the 3 dimensions of query, got {out.dim()}"
    )


@torch.library.register_fake("paged::write_kv")
def _write_kv(
    key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor, **scales: object
) -> None:
    _check_devices(
        "write_kv", key=key, value=value, kv_cache=kv_cache, slot_mapping=slot_mapping, **scales
    )
    _check_shapes(key, kv_cache)


@torch.library.register_fake("paged::copy_blocks")
def _copy_blocks(kv_cache: Tensor, block_pairs: Tensor) -> None:
    _check_devices("copy_blocks", kv_cache=kv_cache, block_pairs=block_pairs)
    torch._check(
        block_pairs.dim() == 2,
        lambda: f"block_pairs must have 2 dimensions, got {block_pairs.dim()}",
    )


@torch.library.register_fake("paged::merge_states")
def _merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    _check_devices("merge_states", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
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
    _check_devices(
        "paged_attention_v1",
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        context_lens=context_lens,
        out=out,
    )
    torch._check(out.dim() == 3, lambda: f"out must have 3 dimensions, got {out.dim()}")
