"""The operators, typed: one function per operator of ``torch.ops.paged``.

Names and shapes are the same throughout:

======================  ========================================================================
``kv_cache``            ``[num_blocks, 2, block_size, num_kv_heads, head_size]``; half 0 is K, half
                        1 is V. Read through its strides, of which only the last must be 1, so a
                        transposed view of ``[num_blocks, block_size, 2, H, D]``, ``[2, num_blocks,
                        block_size, H, D]`` or ``[num_blocks, 2, H, block_size, D]`` storage is a
                        kv_cache too.
``block_table``         int32 ``[num_seqs, max_blocks]``; entry ``[s, i]`` is the block that holds
                        tokens ``i * block_size`` to ``(i + 1) * block_size - 1`` of sequence ``s``.
                        Entries past a sequence's last block are never read.
``seq_lens``            int32 ``[num_seqs]``; KV tokens of each sequence, including those of this
                        call.
``query_start_loc``     int32 ``[num_seqs + 1]``; sequence ``s`` owns the query rows from
                        ``query_start_loc[s]`` up to ``query_start_loc[s + 1]``.
``slot_mapping``        int64 ``[num_tokens]``; where a token goes: ``block * block_size + offset``,
                        or -1 to skip it.
======================  ========================================================================

Tensors are float32, float16 or bfloat16; a kv_cache has the dtype of the query or is float8_e4m3fn
with float32 scales. All of them are on one device. Sums are accumulated in float32.

Every function raises ``RuntimeError`` for a wrong shape, dtype, device or stride before anything is
written, naming the argument, what was expected and what was received. Values (a block id out of
range, a length beyond the block table) are always checked on the CPU. On a GPU they are checked
only with ``PAGED_OPS_CHECK=1``, and the error arrives at the next synchronising call; without it,
an out-of-range value is undefined behaviour there.

The operators are for inference. While grad mode is on, every function here refuses a tensor that
requires grad; the operators themselves, ``torch.ops.paged.*``, do not check this, and no gradient
flows through them. No operator waits for the GPU or reads a length on the host, so a captured CUDA
graph can be replayed with other lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "attention",
    "attention_lse",
    "attention_out",
    "copy_blocks",
    "merge_states",
    "paged_attention_v1",
    "write_kv",
]


# Looked up once: the four attributes would cost 0.2 us per call.
_attention = torch.ops.paged.attention.default
_attention_lse = torch.ops.paged.attention_lse.default
_attention_out = torch.ops.paged.attention_out.default
_write_kv = torch.ops.paged.write_kv.default
_copy_blocks = torch.ops.paged.copy_blocks.default
_merge_states = torch.ops.paged.merge_states.default
_paged_attention_v1 = torch.ops.paged.paged_attention_v1.default


def _refuse_grad(op: str, **arguments: object) -> None:
    """Called in grad mode only, so that the calls of inference do not build ``arguments``."""
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and argument.requires_grad:
            raise RuntimeError(
                f"paged_ops.ops.{op} is for inference only and has no backward, but {name} "
                "requires grad; use torch.no_grad() or torch.inference_mode(), or detach it"
            )


def _options(
    scale: float | None,
    causal: bool,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    batch_invariant: bool,
) -> dict[str, Any]:
    """Those that differ from the schema's defaults: passing all nine would cost 3 us per call."""
    options: dict[str, Any] = {}
    if scale is not None:
        options["scale"] = scale
    if causal is not True:
        options["causal"] = causal
    if window != -1:
        options["window"] = window
    if softcap != 0.0:
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if sinks is not None:
        options["sinks"] = sinks
    if k_scale is not None:
        options["k_scale"] = k_scale
    if v_scale is not None:
        options["v_scale"] = v_scale
    if batch_invariant is not False:
        options["batch_invariant"] = batch_invariant
    return options


def attention(
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
    batch_invariant: bool = False,
) -> Tensor:
    """Attention of new tokens over the cached keys and values of their sequences.

    Decode, prefill, chunked prefill, speculative tokens and any mixture of them are one call:
    without ``query_start_loc`` each sequence has one query token, with it any number. The i-th of a
    sequence's ``query_len`` tokens is at position ``p = seq_len - query_len + i``; key ``j`` gets
    the score::

        s_j = softcap_( scale * query . key_j ) - alibi_slope * |p - j|
        out = sum_j exp(s_j) value_j / ( sum_j exp(s_j) + exp(sink) )

    over the keys it sees, where ``softcap_(x) = softcap * tanh(x / softcap)``, and the terms of
    options that are not given drop out. PagedAttention is described in Kwon et al., "Efficient
    Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023); the running
    softmax in Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

    Args:
        query: ``[num_tokens, num_heads, head_size]``, any strides, the last being 1. ``num_heads``
            is a multiple of ``num_kv_heads``: query head ``h`` reads KV head ``h // (num_heads //
            num_kv_heads)``. ``head_size`` is from 1 to 256.
        kv_cache: ``[num_blocks, 2, block_size, num_kv_heads, head_size]``. Slots that no sequence
            reaches may hold anything, NaN included.
        block_table: int32 ``[num_seqs, max_blocks]``.
        seq_lens: int32 ``[num_seqs]``. 0 is allowed: its rows are 0, as are all rows that see no
            key, or whose scores are all ``-inf``.
        query_start_loc: int32 ``[num_seqs + 1]``, not decreasing. Rows outside of it are 0
            (padding). ``None``: ``num_tokens == num_seqs``, one token each. Where a sequence has
            more query tokens than keys, the first of them are before its first key and see none,
            whether ``causal`` or not.
        scale: what scores are multiplied by, from -1e30 to 1e30; ``head_size ** -0.5`` by default.
        causal: whether a token sees only keys at or before its own position.
        window: how many of the latest keys a token sees, its own included; -1 for all. The keys
            after its own are not affected.
        softcap: the bound on the scores, from 1e-30 (``scale / 1e30``) to 1e30; 0 for none.
        alibi_slopes: float32 ``[num_heads]`` (Press et al., "Train Short, Test Long", 2021).
        sinks: float32 ``[num_heads]``: a logit per head that enters the denominator only
            (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023).
        k_scale: float32 ``[1]`` or ``[num_kv_heads]``: what a float8 key is multiplied by; 1 by
            default.
        v_scale: the same for values.
        batch_invariant: whether the result of a sequence must be the same, bit for bit, whatever
            else is in the batch. On the CPU it always is. On a GPU, sequences are then cut into
            parts by their own length, not evenly over the batch, which costs some speed. The
            environment variable ``PAGED_OPS_BATCH_INVARIANT=1``, read at the first call, makes it
            the default.

    Returns:
        ``[num_tokens, num_heads, head_size]``, contiguous, of the dtype of ``query``.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        >>> kv_cache = torch.randn(8, 2, 16, 4, 64)
        >>> block_table = torch.tensor([[5, 2], [7, 0]], dtype=torch.int32)
        >>> seq_lens = torch.tensor([20, 9], dtype=torch.int32)
        >>> attention(torch.randn(2, 8, 64), kv_cache, block_table, seq_lens).shape
        torch.Size([2, 8, 64])
    """
    options = _options(
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        batch_invariant,
    )
    if torch.is_grad_enabled():
        _refuse_grad("attention", query=query, kv_cache=kv_cache, **options)
    return _attention(query, kv_cache, block_table, seq_lens, query_start_loc, **options)


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
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """``attention`` that also returns the log-sum-exp of the scores, for ``merge_states``.

    Args:
        query: as in ``attention``, like all the others.
        kv_cache: see ``attention``.
        block_table: see ``attention``.
        seq_lens: see ``attention``.
        query_start_loc: see ``attention``.
        scale: see ``attention``.
        causal: see ``attention``.
        window: see ``attention``.
        softcap: see ``attention``.
        alibi_slopes: see ``attention``.
        sinks: see ``attention``; part of the log-sum-exp of every row that sees a key.
        k_scale: see ``attention``.
        v_scale: see ``attention``.
        batch_invariant: see ``attention``.

    Returns:
        ``out`` as ``attention`` returns it, and ``lse``: float32 ``[num_tokens, num_heads]``, the
        natural logarithm of the softmax's denominator; ``-inf`` for a row that sees no key, whether
        there are sinks or not.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        >>> kv_cache = torch.randn(8, 2, 16, 4, 64)
        >>> block_table = torch.tensor([[5, 2]], dtype=torch.int32)
        >>> seq_lens = torch.tensor([0], dtype=torch.int32)
        >>> out, lse = attention_lse(torch.randn(1, 4, 64), kv_cache, block_table, seq_lens)
        >>> out.abs().max().item(), lse.max().item()
        (0.0, -inf)
    """
    options = _options(
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        batch_invariant,
    )
    if torch.is_grad_enabled():
        _refuse_grad("attention_lse", query=query, kv_cache=kv_cache, **options)
    return _attention_lse(query, kv_cache, block_table, seq_lens, query_start_loc, **options)


def attention_out(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None = None,
    *,
    out: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """``attention``, with the result written into a tensor that the caller provides.

    Args:
        query: as in ``attention``, like all the others.
        kv_cache: see ``attention``.
        block_table: see ``attention``.
        seq_lens: see ``attention``.
        query_start_loc: see ``attention``.
        out: ``[num_tokens, num_heads, head_size]`` of float32, float16 or bfloat16, whatever the
            dtype of ``query``; any strides, the last being 1. Every row is written. It may not
            share memory with ``query`` or ``kv_cache``.
        scale: see ``attention``.
        causal: see ``attention``.
        window: see ``attention``.
        softcap: see ``attention``.
        alibi_slopes: see ``attention``.
        sinks: see ``attention``.
        k_scale: see ``attention``.
        v_scale: see ``attention``.
        batch_invariant: see ``attention``.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        >>> kv_cache = torch.randn(8, 2, 16, 4, 64)
        >>> query, out = torch.randn(1, 4, 64), torch.empty(1, 4, 64)
        >>> block_table = torch.tensor([[5, 2]], dtype=torch.int32)
        >>> seq_lens = torch.tensor([1], dtype=torch.int32)
        >>> attention_out(query, kv_cache, block_table, seq_lens, out=out)
        >>> torch.testing.assert_close(out[0], kv_cache[5, 1, 0])
    """
    options = _options(
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        batch_invariant,
    )
    if torch.is_grad_enabled():
        _refuse_grad("attention_out", query=query, kv_cache=kv_cache, out=out, **options)
    _attention_out(query, kv_cache, block_table, seq_lens, query_start_loc, **options, out=out)


def write_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into their slots of the cache, in place.

    A float8 cache stores ``key / k_scale``, rounded to the nearest float8_e4m3fn and clamped to
    ±448. In any other cache, values are stored unchanged.

    Args:
        key: ``[num_tokens, num_kv_heads, head_size]``, any strides, the last being 1.
        value: the same shape and dtype.
        kv_cache: ``[num_blocks, 2, block_size, num_kv_heads, head_size]``; written to. It may not
            share memory with ``key`` or ``value``.
        slot_mapping: int64 ``[num_tokens]``; -1 skips a token. The slots of one call are distinct:
            of two tokens for one slot, either may win.
        k_scale: float32 ``[1]`` or ``[num_kv_heads]``, for a float8 cache only; 1 by default.
        v_scale: the same for values.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        >>> kv_cache = torch.zeros(8, 2, 16, 4, 64)
        >>> key, value = torch.randn(2, 2, 4, 64).unbind()
        >>> write_kv(key, value, kv_cache, torch.tensor([5 * 16 + 3, -1]))
        >>> bool((kv_cache[5, 0, 3] == key[0]).all()), int(kv_cache.count_nonzero()) == 2 * 4 * 64
        (True, True)
    """
    if torch.is_grad_enabled():
        _refuse_grad(
            "write_kv", key=key, value=value, kv_cache=kv_cache, k_scale=k_scale, v_scale=v_scale
        )
    if k_scale is None and v_scale is None:
        _write_kv(key, value, kv_cache, slot_mapping)  # the two keywords would cost 1 us
    else:
        _write_kv(key, value, kv_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def copy_blocks(kv_cache: Tensor, block_pairs: Tensor) -> None:
    """Copy whole blocks, K and V, within a cache, in place: the copy of copy-on-write.

    Args:
        kv_cache: ``[num_blocks, 2, block_size, num_kv_heads, head_size]``; written to.
        block_pairs: int64 ``[num_pairs, 2]`` of (source, destination). No block is a destination
            twice, and none is both source and destination.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        >>> kv_cache = torch.randn(8, 2, 16, 4, 64)
        >>> copy_blocks(kv_cache, torch.tensor([[5, 0], [5, 1]]))
        >>> bool((kv_cache[0] == kv_cache[5]).all() and (kv_cache[1] == kv_cache[5]).all())
        True
    """
    if torch.is_grad_enabled():
        _refuse_grad("copy_blocks", kv_cache=kv_cache)
    _copy_blocks(kv_cache, block_pairs)


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    The two sides come from ``attention_lse``, over the same query::

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    A prefix that many sequences share is attended to once if the query tokens of all of them are
    passed as those of a single sequence: the block table has one row, ``seq_lens`` is ``[the
    prefix's length]``, ``query_start_loc`` is ``[0, num_tokens]``, and ``causal=False``. The other
    side attends to what follows the prefix, as usual; the example below shows both. The prefix ends
    where a block ends, since the table of the other side starts with the next block.

    For the result to be attention over the union:

    - ``scale`` and ``softcap`` are the same on both sides.
    - The side of the prefix is not causal: it takes the query tokens for the last tokens of the
      prefix, and would hide keys from them. (One query token per sequence sees them all anyway.)
    - A sequence has no more query tokens than keys, as the first of them would come before its
      first key and see nothing. So where there are more query tokens than the prefix is long, they
      are divided among several sequences with the same row of the block table, of at most that
      many query tokens each.
    - ``sinks`` are given to one side only, and to one on which every row sees a key, since a row
      that sees none has the log-sum-exp ``-inf``, and its sink is lost. Or they are given to
      neither side and added last: ``out * sigmoid(lse - sinks)[..., None]``.
    - ``alibi_slopes`` and ``window`` cannot be used: each side counts positions from the end of its
      own ``seq_lens``, which on the side of the prefix is not where the query tokens are.

    Args:
        out_a: ``[num_tokens, num_heads, head_size]``, any strides, the last being 1.
        lse_a: float32 ``[num_tokens, num_heads]``, natural logarithm. ``-inf``: this side is empty
            and its ``out_a`` is not read.
        out_b: the same shape and dtype as ``out_a``.
        lse_b: as ``lse_a``.

    Returns:
        ``out`` of the shape and dtype of ``out_a``, contiguous, and ``lse``, float32. Where both
        sides are empty, 0 and ``-inf``.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        Three sequences begin with the same 32 tokens, in blocks 6 and 1, and go on apart:

        >>> query, kv_cache = torch.randn(3, 8, 64), torch.randn(8, 2, 16, 4, 64)
        >>> shared_table = torch.tensor([[6, 1]], dtype=torch.int32)
        >>> own_table = torch.tensor([[4, 0], [2, 5], [3, 0]], dtype=torch.int32)
        >>> shared_len = torch.tensor([32], dtype=torch.int32)
        >>> own_lens = torch.tensor([9, 20, 16], dtype=torch.int32)
        >>> all_tokens = torch.tensor([0, 3], dtype=torch.int32)
        >>> shared = attention_lse(
        ...     query, kv_cache, shared_table, shared_len, all_tokens, causal=False
        ... )
        >>> own = attention_lse(query, kv_cache, own_table, own_lens)
        >>> out, lse = merge_states(*shared, *own)

        The same, but the prefix is read once for each sequence:

        >>> block_table = torch.cat([shared_table.expand(3, -1), own_table], 1)
        >>> torch.testing.assert_close(
        ...     out, attention(query, kv_cache, block_table, shared_len + own_lens)
        ... )
    """
    if torch.is_grad_enabled():
        _refuse_grad("merge_states", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return _merge_states(out_a, lse_a, out_b, lse_b)


def paged_attention_v1(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
) -> None:
    """Decode attention over a K cache and a V cache that are separate tensors, into ``out``.

    Meant for caches that belong to other code. The kernel is that of ``attention``, with ``scale =
    head_size ** -0.5`` and no options.

    Args:
        out: ``[num_seqs, num_heads, head_size]`` of float32, float16 or bfloat16, whatever the
            dtype of ``query``; written to. It may not share memory with the other tensors.
        query: ``[num_seqs, num_heads, head_size]``, one token per sequence.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_size]``, any strides, the last
            being 1.
        value_cache: the same shape and dtype.
        block_table: int32 ``[num_seqs, max_blocks]``.
        context_lens: int32 ``[num_seqs]``, the tokens that each sequence has in the cache.

    Raises:
        RuntimeError: a malformed argument, or one that requires grad in grad mode.

    Example:
        >>> kv_cache = torch.randn(8, 16, 2, 4, 64)
        >>> query, out = torch.randn(1, 4, 64), torch.empty(1, 4, 64)
        >>> block_table, context_lens = torch.tensor([[5, 2]]).int(), torch.tensor([1]).int()
        >>> key_cache, value_cache = kv_cache.unbind(2)
        >>> paged_attention_v1(out, query, key_cache, value_cache, block_table, context_lens)
        >>> torch.testing.assert_close(out[0], value_cache[5, 0])
    """
    if torch.is_grad_enabled():
        _refuse_grad(
            "paged_attention_v1", out=out, query=query, key_cache=key_cache, value_cache=value_cache
        )
    _paged_attention_v1(out, query, key_cache, value_cache, block_table, context_lens)
