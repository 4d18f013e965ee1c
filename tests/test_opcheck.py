"""torch.library.opcheck, all four utilities, on every operator over many inputs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import LAYOUTS, Case, make_inputs, new_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn
MIXED = Case(seq_lens=(9, 1, 20), query_lens=(5, 1, 0), padding=2)

ATTENTION_CASES = [
    Case(),
    MIXED,
    Case(seq_lens=(7,)),
    Case(seq_lens=()),
    Case(seq_lens=(0, 3)),
    Case(seq_lens=(), query_lens=()),
    *(dataclasses.replace(MIXED, layout=layout) for layout in LAYOUTS[1:]),
    *(dataclasses.replace(MIXED, dtype=dtype) for dtype in DTYPES[1:]),
    *(dataclasses.replace(Case(), dtype=dtype, cache_dtype=FLOAT8) for dtype in DTYPES),
    dataclasses.replace(MIXED, cache_dtype=FLOAT8, scales="head"),
    dataclasses.replace(MIXED, alibi=True, sinks=True, softcap=3.0, window=5, scale=0.1),
    dataclasses.replace(
        MIXED, causal=False, num_heads=6, num_kv_heads=2, head_size=40, block_size=5
    ),
]


ALL_BUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def opcheck(op, args, kwargs=None):
    kwargs = kwargs or {}
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    if any(tensor.dtype == FLOAT8 for tensor in tensors):
        # test_schema compares arguments with allclose, which PyTorch lacks for float8.
        torch.library.opcheck(op.default, args, kwargs, test_utils=ALL_BUT_SCHEMA)
    else:
        torch.library.opcheck(op.default, args, kwargs)


def attention_args(case, device):
    inputs = make_inputs(case).to(device)
    if inputs.query.numel() == 0:
        # PyTorch cannot clone an empty tensor with the strides of a slice.
        inputs.query = inputs.query.new_empty(inputs.query.shape)
    return inputs.args, inputs.options


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention(case, device):
    args, options = attention_args(case, device)
    opcheck(torch.ops.paged.attention, args, options)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_lse(case, device):
    args, options = attention_args(case, device)
    opcheck(torch.ops.paged.attention_lse, args, options)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
def test_attention_out(case, out_dtype, device):
    args, options = attention_args(case, device)
    out = torch.zeros(args[0].shape, dtype=out_dtype or case.dtype, device=device)
    opcheck(torch.ops.paged.attention_out, args, {**options, "out": out})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention_v1(layout, dtype, device):
    inputs = make_inputs(Case(layout=layout, dtype=dtype)).to(device)
    key_cache, value_cache = (half.contiguous() for half in inputs.kv_cache.unbind(1))
    args = (inputs.query, key_cache, value_cache, inputs.block_table, inputs.seq_lens)
    out = torch.zeros(inputs.query.shape, device=device)
    opcheck(torch.ops.paged.paged_attention_v1, (out, *args))


def zero_cache(layout, dtype, device):
    """opcheck compares the cache with itself, and NaN does not equal NaN."""
    return new_cache(layout, 6, 4, 2, 8, dtype).nan_to_num_().to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_write_kv(layout, dtype, num_tokens, device):
    key, value = torch.randn(2, num_tokens, 2, 8, device=device).to(dtype).unbind()
    slots = (torch.arange(num_tokens, device=device) * 3) - 1
    cache = zero_cache(layout, dtype, device)
    opcheck(torch.ops.paged.write_kv, (key, value, cache, slots))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_float8(dtype, device):
    key, value = torch.randn(2, 5, 2, 8, device=device).to(dtype).unbind()
    cache = torch.zeros(6, 2, 4, 2, 8, device=device).to(FLOAT8)
    scales = {"k_scale": torch.rand(2, device=device), "v_scale": torch.rand(1, device=device)}
    args = (key, value, cache, torch.arange(5, device=device))
    opcheck(torch.ops.paged.write_kv, args, scales)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", [[], [[0, 5]], [[0, 5], [0, 4], [1, 3]]], ids=str)
def test_copy_blocks(layout, pairs, device):
    block_pairs = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)
    cache = zero_cache(layout, torch.float32, device)
    opcheck(torch.ops.paged.copy_blocks, (cache, block_pairs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_merge_states(dtype, num_tokens, device):
    out_a, out_b = torch.randn(2, num_tokens, 4, 8, device=device).to(dtype).unbind()
    lse_a, lse_b = torch.randn(2, num_tokens, 4, device=device).unbind()
    opcheck(torch.ops.paged.merge_states, (out_a, lse_a, out_b, lse_b))


def test_every_operator_is_checked_here():
    """An operator that is added without a test above fails this one."""
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "paged::" in name
    }
    assert "attention" in registered
    here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert registered <= here
