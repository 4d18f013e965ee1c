"""The attention operators against the reference in float64, over every option."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import LAYOUTS, Case, Inputs, expected, large_random_case, make_inputs, random_case
from conftest import assert_accurate

from paged_ops import ops

MIXED = Case(seq_lens=(33, 1, 64, 20, 7), query_lens=(5, 1, 64, 0, 7))
FLOAT8 = torch.float8_e4m3fn


def check(case: Case, device: torch.device) -> Inputs:
    """Out and lse are right, and the inputs are as they were."""
    inputs = make_inputs(case)
    moved = inputs.to(device)
    out, lse = ops.attention_lse(*moved.args, **moved.options)
    expected_out, expected_lse = expected(inputs)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert_accurate(out, expected_out, case.dtype)
    assert_accurate(lse, expected_lse, case.dtype)
    assert torch.equal(out, ops.attention(*moved.args, **moved.options))
    for before, after in zip(inputs.args, moved.args, strict=True):
        if before is not None:
            assert (
                before.cpu().view(torch.uint8).equal(after.cpu().view(torch.uint8))
                if (before.is_contiguous())
                else torch.allclose(before.float(), after.cpu().float(), equal_nan=True)
            )
    return moved


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(1.0, math.nan), (math.nan, math.nan), (math.nan, 1.0), (math.inf, -math.inf), (1.1, 1.0)],
)
def test_the_comparison_finds_what_differs(actual, expected):
    same = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert_accurate(same.float(), same, torch.float32)
    others = (torch.tensor([1.0, each], dtype=torch.float64) for each in (actual, expected))
    with pytest.raises(AssertionError):
        assert_accurate(*others, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8], ids=["same", "float8"])
@pytest.mark.parametrize("case", [Case(), MIXED], ids=["decode", "mixed"])
def test_dtypes(case, dtype, cache_dtype, device):
    check(dataclasses.replace(case, dtype=dtype, cache_dtype=cache_dtype), device)


@pytest.mark.parametrize("head_size", [1, 7, 32, 64, 80, 96, 112, 128, 129, 192, 256])
def test_head_sizes(head_size, device):
    check(dataclasses.replace(MIXED, head_size=head_size), device)


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 16, 31, 64, 256])
@pytest.mark.parametrize("case", [Case(seq_lens=(1, 300)), MIXED], ids=["decode", "mixed"])
def test_block_sizes(case, block_size, device):
    check(dataclasses.replace(case, block_size=block_size), device)


@pytest.mark.parametrize(
    "heads", [(1, 1), (8, 1), (9, 3), (5, 5), (32, 8), (40, 8), (71, 1)], ids=str
)
def test_group_sizes(heads, device):
    num_heads, num_kv_heads = heads
    check(dataclasses.replace(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads), device)


@pytest.mark.parametrize("seq_len", [0, 1, 15, 16, 17, 31, 32, 33, 511, 512, 513, 3000])
def test_lengths_at_block_edges(seq_len, device):
    check(Case(seq_lens=(seq_len, 5)), device)


@pytest.mark.parametrize(
    "case",
    [
        Case(seq_lens=(2500, 0, 700), sinks=True, alibi=True, window=1000),
        Case(seq_lens=(2500, 700), query_lens=(2, 0), causal=False),
        Case(seq_lens=(1500,), num_heads=14, head_size=129, dtype=torch.bfloat16, softcap=20.0),
        Case(seq_lens=(1500,), cache_dtype=FLOAT8, scales="head"),
    ],
    ids=str,
)
def test_few_rows_of_many_keys(case, device):
    """Several CTAs share the keys of a row, where no matrix units are used either."""
    inputs = check(case, device)
    first = ops.attention_lse(*inputs.args, **inputs.options)
    for _ in range(3):
        again = ops.attention_lse(*inputs.args, **inputs.options)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8], ids=["same", "float8"])
def test_cache_layouts(layout, cache_dtype, device):
    check(dataclasses.replace(MIXED, layout=layout, cache_dtype=cache_dtype), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [-1, 1, 5, 16, 17, 1000])
@pytest.mark.parametrize(
    "case", [Case(), MIXED, Case(seq_lens=(100, 50), query_lens=(40, 50))], ids=str
)
def test_masks(case, causal, window, device):
    check(dataclasses.replace(case, causal=causal, window=window), device)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.5},
        {"scale": -0.1},
        {"scale": 0.0},
        {"softcap": 2.0},
        {"alibi": True},
        {"alibi": True, "causal": False},
        {"sinks": True},
        {"sinks": True, "window": 3, "softcap": 10.0, "alibi": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [Case(), MIXED], ids=["decode", "mixed"])
def test_score_options(case, options, device):
    check(dataclasses.replace(case, **options), device)


@pytest.mark.parametrize("scales", ["", "tensor", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_scales(scales, dtype, device):
    check(dataclasses.replace(MIXED, cache_dtype=FLOAT8, dtype=dtype, scales=scales), device)


@pytest.mark.parametrize(
    "case",
    [
        Case(seq_lens=()),
        Case(seq_lens=(), query_lens=(), padding=0),
        Case(seq_lens=(), query_lens=(), padding=4),
        Case(seq_lens=(0, 0)),
        Case(seq_lens=(0, 0), query_lens=(3, 2)),
        Case(seq_lens=(4, 9), query_lens=(0, 0)),
        Case(seq_lens=(20, 9), query_lens=(2, 9), padding=5),
        Case(seq_lens=(3, 9), query_lens=(7, 9)),  # rows before the first token see nothing
        Case(seq_lens=(0, 9), sinks=True),
    ],
    ids=str,
)
def test_empty_rows(case, device):
    inputs = check(case, device)
    out, lse = ops.attention_lse(*inputs.args, **inputs.options)
    empty = lse.isneginf()
    assert not out[empty].any()
    if case.padding:
        assert empty[-case.padding :].all()


def test_decode_is_the_same_with_and_without_query_start_loc(device):
    inputs = make_inputs(Case(dtype=torch.bfloat16)).to(device)
    starts = torch.arange(4, dtype=torch.int32, device=device)
    decode = ops.attention(*inputs.args[:4])
    assert torch.equal(decode, ops.attention(*inputs.args[:4], starts))


def test_chunked_prefill_equals_prefill(device):
    inputs = make_inputs(Case(seq_lens=(50,), query_lens=(50,))).to(device)
    whole = ops.attention(*inputs.args)
    for begin, end in ((0, 20), (20, 33), (33, 50)):
        chunk = ops.attention(
            inputs.query[begin:end],
            inputs.kv_cache,
            inputs.block_table,
            torch.tensor([end], dtype=torch.int32, device=device),
            torch.tensor([0, end - begin], dtype=torch.int32, device=device),
        )
        torch.testing.assert_close(chunk, whole[begin:end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [Case(seq_lens=(100, 37)), Case(seq_lens=(100,), query_lens=(9,))])
def test_what_a_window_hides_is_not_read(case, device):
    """Blocks wholly before the window may be gone: NaN in them, garbage in their table entries."""
    case = dataclasses.replace(case, window=10)
    inputs = make_inputs(case).to(device)
    before = ops.attention(*inputs.args, **inputs.options)
    for seq, seq_len in enumerate(case.seq_lens):
        query_len = case.query_lens[seq] if case.query_lens else 1
        for i in range((seq_len - query_len - case.window + 1) // case.block_size):
            inputs.kv_cache[inputs.block_table[seq, i]] = math.nan
            inputs.block_table[seq, i] = 2147480000
    assert torch.equal(before, ops.attention(*inputs.args, **inputs.options))


def test_masked_nan_does_not_leak(device):
    """NaN in a key that only later tokens see leaves the earlier tokens' rows as they were."""
    inputs = make_inputs(Case(seq_lens=(20,), query_lens=(4,))).to(device)
    before = ops.attention(*inputs.args)
    inputs.kv_cache[inputs.block_table[0, 1], :, 3] = math.nan  # token 19, the last
    after = ops.attention(*inputs.args)
    assert torch.equal(before[:3], after[:3])
    assert after[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masked_nan_does_not_leak_to_far_tokens(dtype, device):
    """The same where a row sees a few of a tile's keys only, and some rows none of them."""
    case = Case(seq_lens=(60,), query_lens=(50,), head_size=36, dtype=dtype)
    inputs = make_inputs(case).to(device)
    before = ops.attention(*inputs.args)
    inputs.kv_cache[inputs.block_table[0, 3], :, 11] = math.nan  # token 59, the last
    after = ops.attention(*inputs.args)
    assert torch.equal(before[:49], after[:49])
    assert after[49].isnan().all()


@pytest.mark.parametrize("value", [-1e5, 1e5])
def test_large_scores_do_not_overflow(value, device):
    inputs = make_inputs(Case(seq_lens=(40,))).to(device)
    inputs.query.fill_(value)
    out, lse = ops.attention_lse(*inputs.args)
    want_out, want_lse = expected(inputs.to("cpu"))
    assert_accurate(out, want_out, torch.float32)
    assert_accurate(lse, want_lse, torch.float32)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_out_writes_every_row_of_any_dtype(dtype, out_dtype, device):
    inputs = make_inputs(dataclasses.replace(MIXED, dtype=dtype, padding=2)).to(device)
    num_tokens, num_heads, head_size = inputs.query.shape
    guard = torch.full((num_tokens + 2, num_heads, head_size + 5), 7.0, dtype=out_dtype)
    guard = guard.to(device)
    out = guard[1:-1, :, 2:-3]
    ops.attention_out(*inputs.args, out=out, **inputs.options)
    coarser = max(dtype, out_dtype, key=lambda each: torch.finfo(each).eps)
    assert_accurate(out, expected(inputs.to("cpu"))[0], coarser)
    out.fill_(7.0)
    assert (guard == 7.0).all(), "written outside of out"


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_paged_attention_v1(layout, dtype, out_dtype, device):
    inputs = make_inputs(Case(seq_lens=(0, 1, 40), dtype=dtype, layout=layout)).to(device)
    out = torch.full(inputs.query.shape, torch.nan, dtype=out_dtype, device=device)
    key_cache, value_cache = inputs.kv_cache.unbind(1)
    ops.paged_attention_v1(
        out, inputs.query, key_cache, value_cache, inputs.block_table, inputs.seq_lens
    )
    coarser = max(dtype, out_dtype, key=lambda each: torch.finfo(each).eps)
    assert_accurate(out, expected(inputs.to("cpu"))[0], coarser)


@pytest.mark.parametrize("seed", range(150))
def test_random_configurations(seed, device):
    check(random_case(seed), device)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300))
def test_large_random_configurations(seed):
    """In both modes, each twice to the bit; the reference is computed on the GPU too."""
    case = large_random_case(seed)
    device = torch.device("cuda")
    inputs = make_inputs(case).to(device)
    with device:
        expected_out, expected_lse = (each.cpu() for each in expected(inputs))
    for batch_invariant in (False, True):
        options = {**inputs.options, "batch_invariant": batch_invariant}
        out, lse = ops.attention_lse(*inputs.args, **options)
        assert_accurate(out, expected_out, case.dtype)
        assert_accurate(lse, expected_lse, case.dtype)
        again = ops.attention_lse(*inputs.args, **options)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8], ids=str)
def test_over_2_31_elements(dtype, device):
    """A block whose first element lies past 2^31: the offset needs 64 bits."""
    block_size, num_kv_heads, head_size = 16, 8, 128
    num_blocks = 2**31 // (2 * block_size * num_kv_heads * head_size) + 2
    kv_cache = torch.empty(
        num_blocks, 2, block_size, num_kv_heads, head_size, dtype=dtype, device=device
    )
    key, value = torch.randn(2, 1, num_kv_heads, head_size, device=device).bfloat16().unbind()
    slot = torch.tensor([(num_blocks - 1) * block_size + 5], device=device)
    ops.write_kv(key, value, kv_cache, slot)
    assert torch.equal(kv_cache[-1, 1, 5], value[0].to(dtype))
    ops.copy_blocks(kv_cache, torch.tensor([[num_blocks - 1, num_blocks - 2]], device=device))
    assert torch.equal(kv_cache[-2, 0, 5], key[0].to(dtype))
    kv_cache[-1, :, 0] = kv_cache[-1, :, 5].clone()
    query = torch.randn(1, num_kv_heads, head_size, device=device).bfloat16()
    table = torch.tensor([[num_blocks - 1]], dtype=torch.int32, device=device)
    out = ops.attention(query, kv_cache, table, torch.tensor([1], dtype=torch.int32, device=device))
    assert torch.equal(out[0], value[0].to(dtype).bfloat16())


@pytest.mark.parametrize("sink", [None, 0.5, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(seq_lens=(40, 5)),
        MIXED,
        Case(seq_lens=(2500, 700), num_heads=2),  # in several parts
        Case(seq_lens=(100, 20), query_lens=(100, 20), num_heads=8),
    ],
    ids=str,
)
def test_empty_rows_of_infinitely_low_scores(case, dtype, sink, device):
    """They are as rows that see no key, but for a sink: first all rows, then those that see no
    more than the first block."""
    for first_block_only in (False, True):
        inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
        inputs.query.abs_().clamp_min_(0.1)
        if sink is not None:
            inputs.options["sinks"] = torch.full((case.num_heads,), sink)
        blocks = inputs.block_table[:, 0].tolist() if first_block_only else slice(None)
        inputs.kv_cache[blocks, 0, :, :, 3] = -math.inf
        moved = inputs.to(device)
        out, lse = ops.attention_lse(*moved.args, **moved.options)
        expected_out, expected_lse = expected(inputs)
        assert_accurate(out, expected_out, dtype)
        assert_accurate(lse, expected_lse, dtype)
        assert first_block_only or not out.any()


@pytest.mark.parametrize("case", [Case(seq_lens=(40, 600)), MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("sink", [None, 0.5, -math.inf], ids=str)
def test_nan_among_infinitely_low_scores_stays(case, sink, device):
    inputs = make_inputs(case)
    inputs.query.abs_().clamp_min_(0.1)
    if sink is not None:
        inputs.options["sinks"] = torch.full((case.num_heads,), sink)
    inputs.kv_cache[:, 0, :, :, 3] = -math.inf
    inputs.kv_cache[inputs.block_table[0, 0], 0, 0, :, 3] = math.nan
    moved = inputs.to(device)
    out, lse = ops.attention_lse(*moved.args, **moved.options)
    rows = case.query_lens[0] if case.query_lens else 1
    assert out[:rows].isnan().all()
    assert lse[:rows].isnan().all()
    assert not out[rows:].any()
