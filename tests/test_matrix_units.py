"""Sizes and lengths at which the kernels for 16-bit and float8 caches take other paths.

What the options mean is tested in test_attention.py. Here are head sizes that are padded, groups
that fill a matrix fragment or not, sequences that are cut into pieces, and results that must be the
same to the bit.
"""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch
from cases import Case, Inputs, make_inputs
from test_attention import check

from paged_ops import ops

FLOAT8 = torch.float8_e4m3fn
TYPES = [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, FLOAT8)]
DECODE = Case(seq_lens=(1, 130, 0, 47), num_heads=8, num_kv_heads=4, dtype=torch.bfloat16)


@pytest.mark.parametrize(("dtype", "cache_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("head_size", [8, 32, 48, 64, 80, 96, 112, 128, 144, 192, 224, 256])
def test_head_sizes(head_size, dtype, cache_dtype, device):
    case = dataclasses.replace(DECODE, head_size=head_size, dtype=dtype, cache_dtype=cache_dtype)
    check(case, device)


@pytest.mark.parametrize(("dtype", "cache_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [1, 4, 8, 16, 17, 40])
def test_groups(group_size, num_kv_heads, dtype, cache_dtype, device):
    case = Case(
        seq_lens=(1, 130, 0, 47),
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    check(case, device)


@pytest.mark.parametrize("query_len", range(1, 17))
def test_query_lens(query_len, device):
    """A few tokens each, as in speculative decoding, beside a prefill."""
    case = Case(
        seq_lens=(200, 5, 40, 33),
        query_lens=(query_len, min(query_len, 5), 40, 1),
        num_heads=8,
        num_kv_heads=2,
        head_size=128,
        dtype=torch.bfloat16,
        padding=2,
    )
    check(case, device)


@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (12, 4), (32, 4)], ids=str)
@pytest.mark.parametrize(("dtype", "cache_dtype"), TYPES, ids=str)
@pytest.mark.parametrize(
    "seq_lens", [(5000,), (2500, 1, 0, 1700), (3, 4000, 900, 20), (40,) * 30], ids=str
)
def test_cut_sequences(seq_lens, dtype, cache_dtype, heads, device):
    num_heads, num_kv_heads = heads
    check(Case(seq_lens, None, num_heads, num_kv_heads, 64, 16, dtype, cache_dtype), device)


@pytest.mark.parametrize("longest", [100, 300, 600, 1000])
@pytest.mark.parametrize("num_seqs", [3, 20])
def test_short_shares(num_seqs, longest, device):
    """On a large GPU a few tiles for each multiprocessor, for some one more than for others."""
    rng = random.Random(longest)
    seq_lens = tuple(rng.randrange(longest) for _ in range(num_seqs))
    check(Case(seq_lens, None, 8, 8, 64, dtype=torch.bfloat16), device)


def test_equal_sequences_are_cut_alike(device):
    """Where two shares each are a few less than the multiprocessors: else cuts would wander."""
    multiprocessors = int(os.environ.get("EMULATED_MULTIPROCESSORS", "3"))
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        multiprocessors = gpu.multi_processor_count
        if gpu.shared_memory_per_multiprocessor < 200 << 10:
            pytest.skip("has other shares")
    num_seqs = (multiprocessors - multiprocessors // 32) // 2
    one = make_inputs(Case((1039,), None, 8, 1, 128, dtype=torch.bfloat16)).to(device)
    out = ops.attention(
        one.query.repeat(num_seqs, 1, 1),
        one.kv_cache,
        one.block_table.repeat(num_seqs, 1),
        one.seq_lens.repeat(num_seqs),
        scale=one.options["scale"],
    )
    assert torch.equal(out, out[:1].expand_as(out))


@pytest.mark.parametrize("options", [{"window": 300}, {"sinks": True, "softcap": 5.0}], ids=str)
def test_options_of_cut_sequences(options, device):
    case = Case((3000, 700), None, 8, 2, 64, dtype=torch.bfloat16, **options)
    check(case, device)


def rows_alone(inputs: Inputs, seq: int, begin: int, end: int) -> torch.Tensor:
    """The rows of one sequence, computed without the others."""
    device = inputs.query.device
    return ops.attention(
        inputs.query[begin:end],
        inputs.kv_cache,
        inputs.block_table[seq : seq + 1],
        inputs.seq_lens[seq : seq + 1],
        torch.tensor([0, end - begin], dtype=torch.int32, device=device),
        **inputs.options,
        batch_invariant=True,
    )


@pytest.mark.parametrize(("dtype", "cache_dtype"), [*TYPES, (torch.float32, None)], ids=str)
@pytest.mark.parametrize("query_lens", [(1,) * 6, (1, 2, 30, 1, 5, 4)], ids=["decode", "mixed"])
def test_batch_invariant(query_lens, dtype, cache_dtype, device):
    case = Case(
        (3000, 2, 1030, 17, 1025, 2048), query_lens, 8, 4, 64, 16, dtype, cache_dtype=cache_dtype
    )
    inputs = make_inputs(case).to(device)
    together = ops.attention(*inputs.args, **inputs.options, batch_invariant=True)
    begin = 0
    for seq, query_len in enumerate(query_lens):
        end = begin + query_len
        assert torch.equal(rows_alone(inputs, seq, begin, end), together[begin:end])
        begin = end


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_repeats_are_equal(batch_invariant, device):
    """Who comes last differs from run to run, the order of the sums does not."""
    case = Case((4000, 5, 900), None, 8, 2, 128, dtype=torch.bfloat16)
    inputs = make_inputs(case).to(device)
    first = ops.attention(*inputs.args, batch_invariant=batch_invariant)
    for _ in range(20):
        assert torch.equal(first, ops.attention(*inputs.args, batch_invariant=batch_invariant))
