"""Sizes at which prefill takes other paths: several blocks of rows, and several tiles of keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import Case, make_inputs
from test_attention import check

from paged_ops import ops

FLOAT8 = torch.float8_e4m3fn
TYPES = [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, FLOAT8)]
# A whole prompt, the last chunk of one, a chunk before its end, decoding, and nothing.
CHUNKS = Case(
    seq_lens=(70, 201, 0, 130, 33, 9),
    query_lens=(70, 50, 0, 65, 1, 0),
    num_heads=4,
    num_kv_heads=2,
    dtype=torch.bfloat16,
    padding=2,
)


@pytest.mark.parametrize(("dtype", "cache_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 112, 128, 192, 208, 256])
def test_head_sizes(head_size, dtype, cache_dtype, device):
    case = dataclasses.replace(CHUNKS, head_size=head_size, dtype=dtype, cache_dtype=cache_dtype)
    check(case, device)


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 7, 8, 16])
def test_group_sizes(group_size, device):
    check(dataclasses.replace(CHUNKS, num_heads=2 * group_size), device)


@pytest.mark.parametrize("layout", ["slot_kv", "kv_block", "hnd"])
@pytest.mark.parametrize("block_size", [1, 3, 17, 64, 256])
def test_block_sizes(block_size, layout, device):
    check(dataclasses.replace(CHUNKS, block_size=block_size, layout=layout), device)


@pytest.mark.parametrize("cache_dtype", [None, FLOAT8], ids=["same", "float8"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 30},
        {"window": 64, "causal": False},
        {"causal": False},
        {"softcap": 3.0},
        {"alibi": True},
        {"sinks": True},
        {"scale": -0.1},
        {"scale": 0.0},
        {"scale": 3.0},  # logits far apart: what they are measured from has to rise time and again
        {"window": 77, "softcap": 20.0, "alibi": True, "sinks": True},
    ],
    ids=str,
)
def test_options(options, cache_dtype, device):
    check(dataclasses.replace(CHUNKS, cache_dtype=cache_dtype, **options), device)


@pytest.mark.parametrize("options", [{}, {"window": 500}, {"causal": False}], ids=str)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_many_tiles(head_size, options, device):
    """More tiles of keys than are in flight at once."""
    case = dataclasses.replace(
        CHUNKS, seq_lens=(700, 1030), query_lens=(150, 70), head_size=head_size, **options
    )
    check(case, device)


@pytest.mark.parametrize("scales", ["tensor", "head"])
def test_scales(scales, device):
    check(dataclasses.replace(CHUNKS, cache_dtype=FLOAT8, scales=scales), device)


def test_many_sequences(device):
    """More than a warp has lanes, some of them served by another kernel."""
    query_lens = tuple(i % 3 * 13 for i in range(60))
    check(dataclasses.replace(CHUNKS, seq_lens=(30,) * 60, query_lens=query_lens), device)


@pytest.mark.parametrize("query_len", [40, 200, 600])
@pytest.mark.parametrize("num_seqs", [4, 40])
def test_beside_decode(num_seqs, query_len, device):
    """Too little to do for multiprocessors of its own, enough, and more than decoding has."""
    case = dataclasses.replace(
        CHUNKS,
        seq_lens=(*(3200 // num_seqs,) * num_seqs, query_len),
        query_lens=(*(1,) * num_seqs, query_len),
        num_heads=8,
    )
    check(case, device)


@pytest.mark.parametrize("cache_dtype", [None, FLOAT8], ids=["same", "float8"])
def test_query_rows_at_any_address(cache_dtype, device):
    """Rows of 16 bytes are loaded otherwise than rows of 4, to the same effect."""
    inputs = make_inputs(dataclasses.replace(CHUNKS, cache_dtype=cache_dtype)).to(device)
    num_tokens, num_heads, head_size = inputs.query.shape
    wider = torch.zeros(num_tokens, num_heads, head_size + 2, dtype=torch.bfloat16, device=device)
    query = wider[..., 2:]
    query.copy_(inputs.query)
    aligned = ops.attention(*inputs.args)
    assert torch.equal(aligned, ops.attention(query, *inputs.args[1:]))


def test_a_sequence_alone_gives_the_same(device):
    inputs = make_inputs(CHUNKS).to(device)
    together = ops.attention(*inputs.args)
    alone = ops.attention(
        inputs.query[70:120],
        inputs.kv_cache,
        inputs.block_table[1:2],
        inputs.seq_lens[1:2],
        torch.tensor([0, 50], dtype=torch.int32, device=device),
    )
    assert torch.equal(alone, together[70:120])
