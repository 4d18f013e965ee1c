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
from cases import UNUSED_ENTRY, Case, Inputs, expected, make_inputs
from conftest import assert_accurate
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
@pytest.mark.parametrize(
    ("num_seqs", "head_size"), [(3, 64), (10, 64), (21, 64), (33, 128), (128, 64)]
)
def test_short_shares(num_seqs, head_size, longest, device):
    """On a large GPU a few tiles for each multiprocessor, for some one more than for others.

    With 132 multiprocessors a CTA has 1, 4, 4, 2 and 8 KV heads.
    """
    rng = random.Random(longest)
    seq_lens = tuple(rng.randrange(longest) for _ in range(num_seqs))
    check(Case(seq_lens, None, 8, 8, head_size, dtype=torch.bfloat16), device)


def num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(0).multi_processor_count
    return int(os.environ.get("EMULATED_MULTIPROCESSORS", "3"))


def test_equal_sequences_are_cut_alike(device):
    """Where two shares each are a few less than the multiprocessors: else cuts would wander."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        if gpu.shared_memory_per_multiprocessor < 200 << 10:
            pytest.skip("has other shares")
    multiprocessors = num_multiprocessors(device)
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


def most_keys_of_short_shares(num_columns: int, device: torch.device) -> int:
    """Of a batch of few sequences: with more it is cut otherwise."""
    return max(num_multiprocessors(device) // num_columns, 1) * 3072


@pytest.mark.parametrize("more", [0, 513])
@pytest.mark.parametrize("heads", [(8, 8), (68, 4), (24, 12)], ids=str)
@pytest.mark.parametrize("query_lens", [None, (1, 1, 1, 2)], ids=str)
def test_small_batches_of_long_sequences(query_lens, heads, more, device):
    """As many tiles of 256 keys as are short shares, or a few more: then a CTA has more heads."""
    num_heads, num_kv_heads = heads
    row_chunks = 2 if num_heads > 16 * num_kv_heads else 1
    most = most_keys_of_short_shares(num_kv_heads * row_chunks, device)
    lens = (most // 4 + more, 3 * most // 4 - 768, 0, 512)  # no keys take a tile too
    case = Case(lens, query_lens, num_heads, num_kv_heads, 64, 256, torch.bfloat16)
    check(case, device)


@pytest.mark.gpu
def test_a_graph_replays_with_short_and_long_sequences():
    """One scratch memory serves both ways to cut a batch."""
    device = torch.device("cuda")
    most = most_keys_of_short_shares(8, device)
    inputs = make_inputs(Case((most, 700, 5000), None, 32, 8, 64, 256, torch.bfloat16))
    moved = inputs.to(device)
    seq_lens = moved.seq_lens.clone()

    def attend() -> torch.Tensor:
        return ops.attention(moved.query, moved.kv_cache, moved.block_table, seq_lens)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for longest in (most, 3000, most - 1, most // 2, 0, most):
        seq_lens[0] = longest
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, attend())
        wanted, _ = expected(dataclasses.replace(inputs, seq_lens=seq_lens.cpu()))
        assert_accurate(replayed, wanted, torch.bfloat16)


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
        (5000, 2, 1030, 17, 1025, 2048), query_lens, 8, 4, 64, 16, dtype, cache_dtype=cache_dtype
    )
    inputs = make_inputs(case).to(device)
    together = ops.attention(*inputs.args, **inputs.options, batch_invariant=True)
    begin = 0
    for seq, query_len in enumerate(query_lens):
        end = begin + query_len
        assert torch.equal(rows_alone(inputs, seq, begin, end), together[begin:end])
        begin = end


def batch_of(inputs: Inputs, rows: list[int]) -> torch.Tensor:
    """These sequences alone, in this order."""
    return ops.attention(
        inputs.query[rows],
        inputs.kv_cache,
        inputs.block_table[rows],
        inputs.seq_lens[rows],
        **inputs.options,
        batch_invariant=True,
    )


def check_alone(inputs: Inputs, seq: int, device: torch.device) -> torch.Tensor:
    """The right result of a sequence in a batch of its own."""
    alone = batch_of(inputs.to(device), [seq])
    one = dataclasses.replace(
        inputs,
        query=inputs.query[seq : seq + 1],
        block_table=inputs.block_table[seq : seq + 1],
        seq_lens=inputs.seq_lens[seq : seq + 1],
    )
    assert_accurate(alone, expected(one)[0], inputs.query.dtype)
    return alone[0]


@pytest.mark.parametrize("seq_len", [700, 1023, 1024, 1025, 2300])
def test_batch_invariant_at_every_place(seq_len, device):
    """Others before and after it move the borders of shares across it, never its own cuts."""
    case = Case((seq_len, 1500, 17, 0, 2049, 400), None, 8, 1, 128, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    moved, alone = inputs.to(device), check_alone(inputs, 0, device)
    for count in range(1, len(case.seq_lens)):
        others = list(range(1, count + 1))
        for place in range(count + 1):
            batch = [*others[:place], 0, *others[place:]]
            assert torch.equal(batch_of(moved, batch)[place], alone)


def widened(inputs: Inputs, columns: int) -> Inputs:
    """With so many more columns of the block table, which nothing may read."""
    more = torch.full((len(inputs.block_table), columns), UNUSED_ENTRY, dtype=torch.int32)
    return dataclasses.replace(inputs, block_table=torch.cat((inputs.block_table, more), 1))


@pytest.mark.parametrize("seq_len", [1, 1024, 1025, 2300, 5000])
def test_batch_invariant_in_every_table(seq_len, device):
    """How many chunks the table has room for bounds scratch memory, never moves the cuts."""
    case = Case((seq_len, 1), None, 8, 1, 128, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    needed = -(-seq_len // case.block_size)
    narrow = dataclasses.replace(inputs, block_table=inputs.block_table[:, :needed].contiguous())
    alone = check_alone(narrow, 0, device)
    for columns in (1, needed, 100 * needed, 3000):
        wide = widened(narrow, columns).to(device)
        assert torch.equal(batch_of(wide, [1, 0])[1], alone)


@pytest.mark.gpu
def test_scratch_memory_is_for_the_chunks_of_the_table():
    """What a capture allocates, since it takes no memory that is kept from call to call."""
    case = Case((100,), None, 32, 8, 128, dtype=torch.bfloat16)
    inputs = make_inputs(case)

    def allocated(num_tokens: int) -> int:
        columns = num_tokens // case.block_size - inputs.block_table.shape[1]
        wide = widened(inputs, columns).to("cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.attention(*wide.args, batch_invariant=True)
        return torch.cuda.max_memory_allocated() - before

    assert 0 < 4 * allocated(4096) <= allocated(65536)


@pytest.mark.parametrize(
    ("num_kv_heads", "seq_len"), [(8, 32768), (8, 32769), (1, 65536), (1, 65537), (1, 200000)]
)
def test_a_long_one_among_short_ones(num_kv_heads, seq_len, device):
    """From one of these lengths on, a sequence is cut into longer pieces instead of more."""
    lens = (seq_len, *(300,) * 20, 5000)
    case = Case(lens, None, num_kv_heads, num_kv_heads, 128, 256, torch.bfloat16)
    inputs = make_inputs(case)
    moved, alone = inputs.to(device), check_alone(inputs, 0, device)
    others = list(range(1, len(lens)))
    for place in (0, 3, len(others)):
        assert torch.equal(batch_of(moved, [*others[:place], 0, *others[place:]])[place], alone)


@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_each_of_many_as_it_is_alone(num_kv_heads, device):
    """Some shares have many sequences of several pieces, and end within one."""
    rng = random.Random(num_kv_heads)
    lens = tuple(rng.randrange(5000) for _ in range(60))
    case = Case(lens, None, 2 * num_kv_heads, num_kv_heads, 128, 64, torch.bfloat16)
    inputs = make_inputs(case).to(device)
    together = batch_of(inputs, list(range(len(lens))))
    for seq in range(len(lens)):
        assert torch.equal(batch_of(inputs, [seq])[0], together[seq])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_repeats_are_equal(batch_invariant, device):
    """Who comes last differs from run to run, the order of the sums does not."""
    case = Case((4000, 5, 900), None, 8, 2, 128, dtype=torch.bfloat16)
    inputs = make_inputs(case).to(device)
    first = ops.attention(*inputs.args, batch_invariant=batch_invariant)
    for _ in range(20):
        assert torch.equal(first, ops.attention(*inputs.args, batch_invariant=batch_invariant))
