"""write_kv, copy_blocks and merge_states against the reference, bit for bit where bits are
moved."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LAYOUTS, Case, make_inputs, move, new_cache
from conftest import assert_accurate
from torch import Tensor

from paged_ops import ops, reference

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_bytes = [each.cpu().contiguous().view(torch.uint8) for each in (a, b)]
    return torch.equal(*as_bytes)


def make_kv(
    num_tokens: int, heads: int, head_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Key and value as slices of one fused projection."""
    fused = torch.randn(num_tokens, 3 * heads, head_size).to(dtype)
    return fused[:, heads : 2 * heads], fused[:, 2 * heads :]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [None, FLOAT8], ids=["same", "float8"])
@pytest.mark.parametrize("shape", [(16, 2, 64), (3, 5, 7), (1, 1, 1), (7, 3, 130)], ids=str)
def test_write_kv(layout, dtype, cache_dtype, shape, device):
    block_size, heads, head_size = shape
    cache = new_cache(layout, 6, block_size, heads, head_size, cache_dtype or dtype)
    slots = torch.randperm(6 * block_size)[: 5 * block_size]
    slots[::3] = -1
    key, value = make_kv(len(slots), heads, head_size, dtype)
    written = move(cache, device)
    reference.write_kv(key, value, cache, slots)
    ops.write_kv(key.to(device), value.to(device), written, slots.to(device))
    assert same_bits(written, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_write_kv_float8_scales(dtype, count, device):
    cache = new_cache("block_kv", 4, 16, 4, 64, FLOAT8)
    written = move(cache, device)
    key, value = make_kv(20, 4, 64, dtype)
    slots = torch.arange(20)
    scales = {"k_scale": torch.rand(count) + 0.1, "v_scale": torch.rand(count) + 0.1}
    reference.write_kv(key, value, cache, slots, **scales)
    moved = {name: scale.to(device) for name, scale in scales.items()}
    ops.write_kv(key.to(device), value.to(device), written, slots.to(device), **moved)
    assert same_bits(written, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_rounds_every_float8_neighbourhood(dtype, device):
    """All float8 values, the midpoints between them and their neighbours: nearest, ties to even."""
    grid = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    grid = grid[grid.isfinite()].sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, middle, middle * 1.004, middle * 0.996]).to(dtype)
    key = points.view(-1, 1, 1)
    cache = torch.zeros(key.size(0), 2, 1, 1, 1).to(FLOAT8).to(device)
    slots = torch.arange(key.size(0), device=device)
    ops.write_kv(key.to(device), key.to(device), cache, slots)
    assert same_bits(cache[:, 0, 0], points.view(-1, 1, 1).float().to(FLOAT8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_float8_saturates_and_keeps_nan(dtype, device):
    values = torch.tensor(
        [1e4, -1e4, 448.0, 464.0, 465.0, math.inf, -math.inf, math.nan, 1e-9, -0.0]
    )
    key = values.to(dtype).view(1, 1, -1).to(device)
    cache = torch.zeros(1, 2, 1, 1, key.size(2)).to(FLOAT8).to(device)
    ops.write_kv(key, key, cache, torch.tensor([0], device=device))
    got = cache[0, 0, 0, 0].float().cpu()
    assert got[:7].tolist() == [448.0, -448.0, 448.0, 448.0, 448.0, 448.0, -448.0]
    assert got[7].isnan()
    assert got[8:].tolist() == [0.0, 0.0]


def test_write_kv_of_nothing(device):
    cache = new_cache("block_kv", 2, 4, 2, 8, torch.float32).to(device)
    before = cache.clone()
    key = torch.randn(3, 2, 8, device=device)
    ops.write_kv(key, key, cache, torch.full((3,), -1, device=device))
    ops.write_kv(key[:0], key[:0], cache, torch.empty(0, dtype=torch.int64, device=device))
    assert same_bits(cache, before)


@pytest.mark.parametrize("num_tokens", [1, 2, 700])
def test_write_kv_touches_nothing_else(num_tokens, device):
    """Many rows, so that the work is split, and no byte outside of the slots changes."""
    cache = move(new_cache("slice", 50, 16, 3, 40, torch.float32), device)
    before = cache.clone()
    slots = torch.randperm(800)[:num_tokens]
    key, value = make_kv(num_tokens, 3, 40, torch.float32)
    ops.write_kv(key.to(device), value.to(device), cache, slots.to(device))
    untouched = torch.ones(50, 16, dtype=torch.bool)
    untouched.view(-1)[slots] = False
    for half, new in enumerate((key, value)):
        assert same_bits(cache[:, half].cpu()[untouched], before[:, half].cpu()[untouched])
        assert same_bits(cache[:, half].cpu().flatten(0, 1)[slots], new)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8], ids=str)
@pytest.mark.parametrize("shape", [(16, 2, 64), (3, 5, 7), (1, 1, 1)], ids=str)
def test_copy_blocks(layout, dtype, shape, device):
    cache = new_cache(layout, 9, *shape, dtype)
    cache.copy_(torch.randn(cache.shape).to(dtype))
    copied = move(cache, device)
    pairs = torch.tensor([[3, 0], [3, 8], [1, 2]])
    reference.copy_blocks(cache, pairs)
    ops.copy_blocks(copied, pairs.to(device))
    assert same_bits(copied, cache)
    ops.copy_blocks(copied, pairs[:0].to(device))
    assert same_bits(copied, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 64), (0, 4, 64), (3, 1, 1), (200, 7, 130)], ids=str)
def test_merge_states(dtype, shape, device):
    out_a, out_b = torch.randn(2, *shape).to(dtype).unbind()
    lse_a, lse_b = (torch.randn(2, *shape[:2]) * 5).unbind()
    out, lse = ops.merge_states(*(each.to(device) for each in (out_a, lse_a, out_b, lse_b)))
    expected_out, expected_lse = reference.merge_states(out_a, lse_a, out_b, lse_b)
    assert out.dtype == dtype
    assert_accurate(out, expected_out, dtype)
    assert_accurate(lse, expected_lse, torch.float32)


def test_merge_states_of_empty_sides(device):
    out_a = torch.randn(4, 2, 8)
    lse_a = torch.randn(4, 2)
    out_b, lse_b = torch.full_like(out_a, math.nan), torch.full_like(lse_a, -math.inf)
    args = [each.to(device) for each in (out_a, lse_a, out_b, lse_b)]
    for order in (args, args[2:] + args[:2]):
        out, lse = ops.merge_states(*order)
        assert torch.equal(out.cpu(), out_a)
        assert torch.equal(lse.cpu(), lse_a)
    out, lse = ops.merge_states(*args[2:], *args[2:])
    assert not out.any()
    assert lse.isneginf().all()


def test_merging_two_halves_of_a_context_equals_the_whole(device):
    inputs = make_inputs(Case(seq_lens=(64, 48))).to(device)
    whole_out, whole_lse = ops.attention_lse(*inputs.args)
    prefix = torch.tensor([32, 16], dtype=torch.int32, device=device)
    state_a = ops.attention_lse(inputs.query, inputs.kv_cache, inputs.block_table, prefix)
    rest_table = torch.stack((inputs.block_table[0, 2:4], inputs.block_table[1, 1:3])).contiguous()
    state_b = ops.attention_lse(inputs.query, inputs.kv_cache, rest_table, inputs.seq_lens - prefix)
    out, lse = ops.merge_states(*state_a, *state_b)
    assert_accurate(out, whole_out.cpu().double(), torch.float32)
    assert_accurate(lse, whole_lse.cpu().double(), torch.float32)


@pytest.mark.parametrize("sinks", ["none", "own side", "last"])
@pytest.mark.parametrize("query_lens", [None, (3, 1, 9), (3, 1, 17)], ids=str)
def test_a_shared_prefix_is_attended_to_once(query_lens, sinks, device):
    """As the docstring says: by one sequence, or two where the query tokens are more than 16."""
    case = Case(seq_lens=(37, 20, 33), query_lens=query_lens, scale=0.3, softcap=20.0)
    inputs = make_inputs(case)
    inputs.block_table[:, 0] = inputs.block_table[0, 0]
    logits = torch.randn(case.num_heads)
    with_sinks = {**inputs.options, "sinks": None if sinks == "none" else logits}
    whole = reference.attention_lse(*inputs.args, **with_sinks)

    num_tokens = inputs.query.size(0)
    inputs, logits = inputs.to(device), logits.to(device)
    starts = [0, num_tokens] if num_tokens <= 16 else [0, 16, num_tokens]
    prefix = ops.attention_lse(
        inputs.query,
        inputs.kv_cache,
        inputs.block_table[: len(starts) - 1, :1],
        torch.full((len(starts) - 1,), 16, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        **{**inputs.options, "causal": False},
    )
    own = ops.attention_lse(
        inputs.query,
        inputs.kv_cache,
        inputs.block_table[:, 1:],
        inputs.seq_lens - 16,
        inputs.query_start_loc,
        **inputs.options,
        sinks=logits if sinks == "own side" else None,
    )
    out, lse = ops.merge_states(*prefix, *own)
    if sinks == "last":
        out, lse = out * torch.sigmoid(lse - logits)[..., None], torch.logaddexp(lse, logits)
    assert_accurate(out, whole[0], torch.float32)
    assert_accurate(lse, whole[1], torch.float32)


def test_merge_states_keeps_nan(device):
    """Beside any other side, the empty one included, and in what is merged from the result."""
    out_a = torch.randn(4, 2, 8)
    lse_a = torch.full((4, 2), math.nan)
    for other in (-math.inf, 0.0, math.nan):
        out_b, lse_b = torch.randn(4, 2, 8), torch.full((4, 2), other)
        args = [each.to(device) for each in (out_a, lse_a, out_b, lse_b)]
        for order in (args, args[2:] + args[:2]):
            out, lse = ops.merge_states(*order)
            assert out.isnan().all()
            assert lse.isnan().all()
