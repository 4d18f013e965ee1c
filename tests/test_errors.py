"""Every malformed argument is refused with a message that names it, before anything is written."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import move
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from paged_ops import ops

Arguments = dict[str, Any]
FLOAT8 = torch.float8_e4m3fn


def attention_arguments(device: torch.device) -> Arguments:
    """A right call: 3 sequences, 5 query tokens, 8 blocks of 4 slots, 2 KV heads of size 16."""
    return {
        "query": torch.randn(5, 4, 16, device=device),
        "kv_cache": torch.randn(8, 2, 4, 2, 16, device=device),
        "block_table": torch.arange(6, dtype=torch.int32, device=device).view(3, 2),
        "seq_lens": torch.tensor([8, 3, 5], dtype=torch.int32, device=device),
        "query_start_loc": torch.tensor([0, 2, 3, 5], dtype=torch.int32, device=device),
    }


def attention_out_arguments(device: torch.device) -> Arguments:
    return {**attention_arguments(device), "out": torch.full((5, 4, 16), 7.0, device=device)}


def v1_arguments(device: torch.device) -> Arguments:
    right = attention_arguments(device)
    return {
        "out": torch.full((3, 4, 16), 7.0, device=device),
        "query": right["query"][:3],
        "key_cache": right["kv_cache"][:, 0],
        "value_cache": right["kv_cache"][:, 1],
        "block_table": right["block_table"],
        "context_lens": right["seq_lens"],
    }


def write_kv_arguments(device: torch.device) -> Arguments:
    return {
        "key": torch.randn(3, 2, 16, device=device),
        "value": torch.randn(3, 2, 16, device=device),
        "kv_cache": torch.randn(8, 2, 4, 2, 16, device=device),
        "slot_mapping": torch.tensor([1, -1, 9], device=device),
    }


def copy_blocks_arguments(device: torch.device) -> Arguments:
    return {
        "kv_cache": torch.randn(8, 2, 4, 2, 16, device=device),
        "block_pairs": torch.tensor([[0, 5], [1, 6]], device=device),
    }


def merge_states_arguments(device: torch.device) -> Arguments:
    return {
        "out_a": torch.randn(3, 4, 16, device=device),
        "lse_a": torch.randn(3, 4, device=device),
        "out_b": torch.randn(3, 4, 16, device=device),
        "lse_b": torch.randn(3, 4, device=device),
    }


RIGHT: dict[str, Callable[[torch.device], Arguments]] = {
    "attention": attention_arguments,
    "attention_lse": attention_arguments,
    "attention_out": attention_out_arguments,
    "paged_attention_v1": v1_arguments,
    "write_kv": write_kv_arguments,
    "copy_blocks": copy_blocks_arguments,
    "merge_states": merge_states_arguments,
}


def with_options(op: str, device: torch.device) -> Arguments:
    """A right call in which every optional tensor is given."""
    arguments = RIGHT[op](device)
    if op in ("attention", "attention_lse", "attention_out"):
        arguments |= {name: ones(4, device=device) for name in ("alibi_slopes", "sinks")}
    if "slot_mapping" in arguments or "sinks" in arguments:
        arguments["kv_cache"] = arguments["kv_cache"].to(FLOAT8)
        arguments |= {name: ones(1, device=device) for name in ("k_scale", "v_scale")}
    return arguments


Change = Callable[[Tensor], Any]


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def const(value: Any) -> Change:
    """For arguments that are not given by default; tensors go to the device of the others."""
    return lambda _: value


def first_two(tensor: Tensor) -> Tensor:
    return tensor[:2]


def strided(tensor: Tensor) -> Tensor:
    """The same shape and values with stride 2 in the last dimension."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def misaligned(tensor: Tensor) -> Tensor:
    """The same shape, dtype and values at an odd address, where no tensor of torch lies."""
    data = bytearray(1) + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(data, dtype=tensor.dtype, offset=1).view(tensor.shape)


def put(index: int | tuple[int, ...], value: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def empty_dim(dim: int) -> Change:
    return lambda tensor: tensor.narrow(dim, 0, 0)


ones = torch.ones

# (operator, argument, what is done to it, what the message says beside the argument's name)
MALFORMED: list[tuple[str, str, Change, str]] = [
    ("attention", "query", flat, "[num_tokens, num_heads, head_size]"),
    ("attention", "query", to(torch.float64), "float32 or float16 or bfloat16, got float64"),
    ("attention", "query", to(torch.int32), "got int32"),
    ("attention", "query", to(FLOAT8), "got float8_e4m3fn"),
    ("attention", "query", strided, "stride 1 in its last dimension"),
    ("attention", "query", lambda t: t[:, :3], "multiple of num_kv_heads=2 heads, got 3"),
    ("attention", "query", empty_dim(1), "multiple of num_kv_heads=2 heads, got 0"),
    ("attention", "kv_cache", lambda t: t[..., :8], "head_size=16 (from query)"),
    ("attention", "kv_cache", lambda t: t[:, 0], "[num_blocks, 2, block_size, num_kv_heads,"),
    (
        "attention",
        "kv_cache",
        lambda t: t.transpose(1, 2),
        "be [num_blocks, 2, block_size, num_kv_heads, head_size]",
    ),
    ("attention", "kv_cache", to(torch.float16), "dtype of query (float32)"),
    ("attention", "kv_cache", to(torch.float64), "or be float8_e4m3fn, got float64"),
    ("attention", "kv_cache", to(torch.float8_e5m2), "or be float8_e4m3fn, got float8_e5m2"),
    ("attention", "kv_cache", to(torch.complex64), "or be float8_e4m3fn, got another dtype"),
    ("attention", "kv_cache", strided, "stride 1 in its last dimension"),
    ("attention", "kv_cache", empty_dim(2), "block_size of at least 1, got 0"),
    ("attention", "kv_cache", empty_dim(3), "at least one KV head, got 0"),
    ("attention", "block_table", to(torch.int64), "int32, got int64"),
    ("attention", "block_table", to(torch.float32), "int32, got float32"),
    ("attention", "block_table", to(torch.int16), "int32, got int16"),
    ("attention", "block_table", to(torch.uint8), "int32, got uint8"),
    ("attention", "block_table", to(torch.bool), "int32, got bool"),
    ("attention", "block_table", flat, "[num_seqs, max_blocks]"),
    ("attention", "block_table", strided, "stride 1"),
    ("attention", "seq_lens", to(torch.int64), "int32, got int64"),
    ("attention", "seq_lens", first_two, "num_seqs=3 (from block_table), got [2]"),
    ("attention", "seq_lens", strided, "contiguous"),
    ("attention", "seq_lens", lambda t: t[:, None], "[num_seqs]"),
    ("attention", "query_start_loc", to(torch.int64), "int32, got int64"),
    ("attention", "query_start_loc", first_two, "num_seqs + 1=4"),
    ("attention", "query_start_loc", strided, "contiguous"),
    ("attention", "scale", const(math.nan), "finite"),
    ("attention", "scale", const(math.inf), "finite"),
    ("attention", "window", const(0), "-1 (no limit) or at least 1, got 0"),
    ("attention", "window", const(-2), "got -2"),
    ("attention", "softcap", const(-1.0), "0 (none) or positive"),
    ("attention", "softcap", const(math.nan), "0 (none) or positive"),
    ("attention", "alibi_slopes", const(ones(3)), "num_heads=4 (from query), got [3]"),
    ("attention", "alibi_slopes", const(ones(4, dtype=torch.float16)), "float32, got float16"),
    ("attention", "alibi_slopes", const(ones(8)[::2]), "contiguous"),
    ("attention", "sinks", const(ones(2)), "num_heads=4 (from query), got [2]"),
    ("attention", "sinks", const(ones(4, 1)), "[num_heads]"),
    ("attention", "sinks", const(ones(4, dtype=torch.bfloat16)), "float32, got bfloat16"),
    ("attention", "k_scale", const(ones(1)), "cache only, got a cache of float32"),
    ("attention", "v_scale", const(ones(1)), "float8_e4m3fn cache only"),
    ("attention_lse", "seq_lens", first_two, "num_seqs=3"),
    ("attention_out", "out", first_two, "num_tokens=5 (from query)"),
    ("attention_out", "out", lambda t: t[..., :8], "head_size=16 (from query)"),
    ("attention_out", "out", to(torch.float64), "got float64"),
    ("attention_out", "out", to(FLOAT8), "got float8_e4m3fn"),
    ("attention_out", "out", strided, "stride 1"),
    ("attention_out", "out", expanded, "overlap itself"),
    ("paged_attention_v1", "out", to(torch.int32), "got int32"),
    ("paged_attention_v1", "out", lambda t: t[:, :2], "num_heads=4"),
    ("paged_attention_v1", "out", expanded, "overlap itself"),
    ("paged_attention_v1", "query", lambda t: t[:, :3], "num_kv_heads=2"),
    ("paged_attention_v1", "key_cache", lambda t: t[None], "[num_blocks, block_size,"),
    ("paged_attention_v1", "key_cache", to(torch.bfloat16), "dtype of query"),
    ("paged_attention_v1", "value_cache", lambda t: t[:, :2], "block_size=4 (from key_cache)"),
    ("paged_attention_v1", "value_cache", to(FLOAT8), "float32, got float8_e4m3fn"),
    ("paged_attention_v1", "value_cache", strided, "stride 1"),
    ("paged_attention_v1", "block_table", to(torch.int64), "int32, got int64"),
    ("paged_attention_v1", "context_lens", to(torch.int64), "int32, got int64"),
    ("paged_attention_v1", "context_lens", first_two, "num_seqs=3"),
    ("write_kv", "key", flat, "[num_tokens, num_kv_heads, head_size]"),
    ("write_kv", "key", to(torch.float64), "got float64"),
    ("write_kv", "key", strided, "stride 1"),
    ("write_kv", "value", first_two, "head_size=16 (from key), got [2, 2, 16]"),
    ("write_kv", "value", to(torch.float16), "float32, got float16"),
    ("write_kv", "value", strided, "stride 1"),
    ("write_kv", "kv_cache", to(torch.float16), "dtype of key"),
    ("write_kv", "kv_cache", lambda t: t[..., :1, :], "num_kv_heads=2 (from key)"),
    ("write_kv", "kv_cache", lambda t: t[..., :8], "head_size=16 (from key)"),
    ("write_kv", "kv_cache", strided, "stride 1"),
    ("write_kv", "kv_cache", expanded, "overlap itself"),
    ("write_kv", "slot_mapping", to(torch.int32), "int64, got int32"),
    ("write_kv", "slot_mapping", first_two, "num_tokens=3 (from key)"),
    ("write_kv", "slot_mapping", strided, "contiguous"),
    ("write_kv", "k_scale", const(ones(1)), "float8_e4m3fn cache only"),
    ("copy_blocks", "kv_cache", lambda t: t[0], "[num_blocks, 2,"),
    ("copy_blocks", "kv_cache", to(torch.int32), "got int32"),
    ("copy_blocks", "kv_cache", expanded, "overlap itself"),
    ("copy_blocks", "block_pairs", to(torch.int32), "int64, got int32"),
    ("copy_blocks", "block_pairs", flat, "[num_pairs, 2]"),
    ("copy_blocks", "block_pairs", lambda t: t[:, :1], "[num_pairs, 2]"),
    ("copy_blocks", "block_pairs", strided, "contiguous"),
    ("merge_states", "out_a", to(torch.float64), "got float64"),
    ("merge_states", "out_a", strided, "stride 1"),
    ("merge_states", "out_b", to(torch.float16), "float32, got float16"),
    ("merge_states", "out_b", first_two, "num_tokens=3 (from out_a)"),
    ("merge_states", "lse_a", to(torch.float16), "float32, got float16"),
    ("merge_states", "lse_a", first_two, "num_tokens=3 (from out_a)"),
    ("merge_states", "lse_b", lambda t: t[:, :2], "num_heads=4 (from out_a)"),
]

# What only the values tell: checked on the CPU always.
BAD_VALUES: list[tuple[str, str, Change, str]] = [
    (
        "attention",
        "block_table",
        put((1, 0), 8),
        "block_table[1, 0] must be a block id below 8, got 8",
    ),
    ("attention", "block_table", put((0, 1), -1), "block_table[0, 1]"),
    ("attention", "block_table", put((2, 1), 2147480000), "got 2147480000"),
    (
        "attention",
        "seq_lens",
        put(0, 9),
        "seq_lens[0] must be from 0 to max_blocks * block_size = 8, got 9",
    ),
    ("attention", "seq_lens", put(2, -1), "seq_lens[2]"),
    ("attention", "query_start_loc", put(0, -1), "query_start_loc[0]"),
    ("attention", "query_start_loc", put(1, 4), "query_start_loc[2] must be at least 4, got 3"),
    (
        "attention",
        "query_start_loc",
        put(3, 6),
        "query_start_loc[3] must be at most num_tokens=5, got 6",
    ),
    ("attention_out", "block_table", put((1, 0), 8), "block_table[1, 0]"),
    ("attention_out", "seq_lens", put(1, 100), "seq_lens[1]"),
    ("paged_attention_v1", "block_table", put((2, 0), 99), "block_table[2, 0]"),
    ("paged_attention_v1", "context_lens", put(0, 9), "paged_attention_v1: context_lens[0]"),
    (
        "write_kv",
        "slot_mapping",
        put(2, 32),
        "slot_mapping[2] must be -1 (skip) or a slot below 32, got 32",
    ),
    ("write_kv", "slot_mapping", put(1, -2), "slot_mapping[1]"),
    ("write_kv", "slot_mapping", put(0, 2**62), "slot_mapping[0]"),
    (
        "copy_blocks",
        "block_pairs",
        put((1, 1), 8),
        "block_pairs[1, 1] must be a block id below 8, got 8",
    ),
    ("copy_blocks", "block_pairs", put((0, 0), -1), "block_pairs[0, 0]"),
    ("copy_blocks", "block_pairs", put((1, 1), 5), "a destination given once, got 5"),
    ("copy_blocks", "block_pairs", put((1, 0), 5), "a source that is no destination, got 5"),
]


def call(op: str, arguments: Arguments) -> Any:
    return getattr(ops, op)(**arguments)


def refused(op: str, arguments: Arguments, name: str, message: str) -> None:
    """The call raises a message about `name`, and every tensor is as before."""
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(RuntimeError) as error:
        call(op, arguments)
    text = str(error.value)
    # At the start: the arguments that sizes and devices are taken from are named too.
    assert text.startswith((f"paged::{op}: {name} ", f"paged::{op}: {name}["))
    assert message in text
    for key, value in before.items():
        as_bytes = [each.contiguous().view(torch.uint8) for each in (value, arguments[key])]
        assert torch.equal(*as_bytes), f"{key} was written"


def malformed(op: str, name: str, change: Change, device: torch.device) -> Arguments:
    arguments = RIGHT[op](device)
    changed = change(arguments.get(name))
    # Strides are what some of them are about.
    arguments[name] = move(changed, device) if isinstance(changed, Tensor) else changed
    return arguments


def ids(cases: list[tuple[str, str, Change, str]]) -> list[str]:
    return [f"{op}-{name}-{message}" for op, name, _, message in cases]


@pytest.mark.parametrize("op", RIGHT)
def test_the_right_call_passes(op, device):
    call(op, RIGHT[op](device))


@pytest.mark.parametrize(("op", "name", "change", "message"), MALFORMED, ids=ids(MALFORMED))
def test_malformed_argument(op, name, change, message, device):
    refused(op, malformed(op, name, change, device), name, message)


@pytest.mark.parametrize(
    ("op", "changed", "change", "name", "message"),
    [
        ("attention", "block_table", first_two, "seq_lens", "num_seqs=2 (from block_table)"),
        ("attention_lse", "query", lambda t: t[..., :8], "kv_cache", "head_size=8 (from query)"),
        ("paged_attention_v1", "query", first_two, "block_table", "num_seqs=2 (from query)"),
    ],
)
def test_the_later_of_two_that_disagree_is_named(op, changed, change, name, message, device):
    refused(op, malformed(op, changed, change, device), name, message)


@pytest.mark.parametrize(("op", "name", "change", "message"), BAD_VALUES, ids=ids(BAD_VALUES))
def test_bad_value(op, name, change, message):
    refused(op, malformed(op, name, change, torch.device("cpu")), name, message)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("op", ["attention", "write_kv"])
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (ones(3), "1 element or num_kv_heads=2"),
        (ones(2, 1), "1 element or num_kv_heads=2"),
        (ones(1, dtype=torch.float64), "float32, got float64"),
        (ones(4)[::2], "contiguous"),
        (ones(0), "1 element or num_kv_heads=2"),
    ],
    ids=str,
)
def test_malformed_scale(op, name, scale, message, device):
    arguments = RIGHT[op](device)
    arguments["kv_cache"] = arguments["kv_cache"].to(FLOAT8)
    refused(op, {**arguments, name: move(scale, device)}, name, message)


@pytest.mark.parametrize("head_size", [0, 257])
@pytest.mark.parametrize("op", ["attention", "write_kv"])
def test_head_size_out_of_range(op, head_size, device):
    arguments = RIGHT[op](device)
    for name in ("query", "key", "value", "kv_cache"):
        if name in arguments:
            shape = (*arguments[name].shape[:-1], head_size)
            arguments[name] = torch.randn(shape, device=device)
    refused(op, arguments, "kv_cache", f"head_size from 1 to 256, got {head_size}")


@pytest.mark.parametrize(
    ("op", "changed", "alias", "written", "read"),
    [
        ("attention_out", "query", lambda arguments: arguments["out"], "out", "query"),
        (
            "attention_out",
            "out",
            lambda arguments: arguments["kv_cache"].view(-1)[:320].view(5, 4, 16),
            "out",
            "kv_cache",
        ),
        ("paged_attention_v1", "out", lambda arguments: arguments["query"], "out", "query"),
        (
            "paged_attention_v1",
            "out",
            lambda arguments: arguments["key_cache"][:3, :2].flatten(1, 2),
            "out",
            "key_cache",
        ),
        ("write_kv", "key", lambda arguments: arguments["kv_cache"][2, 0, :3], "kv_cache", "key"),
        (
            "write_kv",
            "value",
            lambda arguments: arguments["kv_cache"][1, 1, 1:],
            "kv_cache",
            "value",
        ),
    ],
)
def test_shared_memory_of_read_and_written(op, changed, alias, written, read, device):
    arguments = RIGHT[op](device)
    arguments[changed] = alias(arguments)
    refused(op, arguments, written, f"must not share memory with {read}, got")


# The tensor that says where the others have to be, if not the first.
ANCHOR = {"paged_attention_v1": "query"}


def all_but_the_anchor(op: str) -> list[str]:
    names = list(with_options(op, torch.device("cpu")))
    names.remove(ANCHOR.get(op, names[0]))
    return names


ON_ANOTHER_DEVICE = [(op, name) for op in RIGHT for name in all_but_the_anchor(op)]


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name"), ON_ANOTHER_DEVICE)
def test_tensors_on_two_devices(op, name):
    right = with_options(op, torch.device("cuda"))
    refused(op, {**right, name: right[name].cpu()}, name, "must be on cuda:0 like ")


@pytest.mark.parametrize(("op", "name"), ON_ANOTHER_DEVICE)
def test_a_meta_tensor_beside_others(op, name):
    """The call is sent to the fakes, which would leave what it has to write as it was."""
    right = with_options(op, torch.device("cpu"))
    arguments = {**right, name: right[name].to("meta")}
    with pytest.raises(RuntimeError, match=f"^paged::{op}: {name} must be on cpu like .*got meta$"):
        call(op, arguments)


@pytest.mark.parametrize("op", RIGHT)
def test_an_anchor_on_the_meta_device(op):
    right = with_options(op, torch.device("cpu"))
    anchor = ANCHOR.get(op, next(iter(right)))
    right[anchor] = right[anchor].to("meta")
    with pytest.raises(RuntimeError, match=f"must be on meta like {anchor}, got cpu"):
        call(op, right)


@pytest.mark.parametrize(("op", "name"), ON_ANOTHER_DEVICE)
def test_tensors_on_two_devices_are_found_while_tracing(op, name):
    with FakeTensorMode():
        right = with_options(op, torch.device("cpu"))
        call(op, right)
        with pytest.raises(RuntimeError, match=f"{op}: {name} must be on cpu like .*got cuda:0"):
            call(op, {**right, name: right[name].to("cuda:0")})


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in RIGHT for name in with_options(op, torch.device("cpu"))]
)
def test_misaligned_memory(op, name):
    """As torch.frombuffer and DLPack let it come."""
    arguments = RIGHT[op](torch.device("cpu"))
    if name not in arguments:
        arguments = with_options(op, torch.device("cpu"))
    arguments[name] = misaligned(arguments[name])
    size = arguments[name].element_size()
    refused(op, arguments, name, f"lie at a multiple of {size} bytes, the size of an element, got")


def differentiable(op: str) -> list[str]:
    """The tensors that may require grad: all but the integers."""
    arguments = with_options(op, torch.device("cpu"))
    return [name for name, value in arguments.items() if value.is_floating_point()]


def test_every_tensor_is_among_the_options():
    """An optional tensor that is added to an operator has to be added above."""
    for op in RIGHT:
        schema = getattr(torch.ops.paged, op).default._schema
        names = {each.name for each in schema.arguments if "Tensor" in str(each.type)}
        assert set(with_options(op, torch.device("cpu"))) == names


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in RIGHT for name in differentiable(op)]
)
def test_grad_is_refused(op, name):
    arguments = with_options(op, torch.device("cpu"))
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} is for inference only.*but {name} requires grad"):
        call(op, arguments)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            call(op, arguments)


def tensors_left(op: str, arguments: Arguments) -> list[str]:
    """Makes the call, empties `arguments`, and names the tensors that then still live."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    try:
        result = call(op, arguments)
    except RuntimeError:
        result = None
    results = (result,) if isinstance(result, Tensor) else result or ()
    tensors |= {f"result {i}": tensor for i, tensor in enumerate(results)}
    references = {name: weakref.ref(tensor) for name, tensor in tensors.items()}
    del result, results
    arguments.clear()
    tensors.clear()
    return [name for name, reference in references.items() if reference() is not None]


@pytest.mark.parametrize("op", RIGHT)
def test_every_argument_and_result_is_let_go(op, device):
    assert tensors_left(op, RIGHT[op](device)) == []
    assert tensors_left(op, with_options(op, device)) == []
    wrong = next(each for each in MALFORMED if each[0] == op)
    for right in (RIGHT[op](device), with_options(op, device)):
        name, change = wrong[1:3]
        right[name] = change(right[name])
        assert tensors_left(op, right) == []


def test_several_tokens_per_sequence_need_query_start_loc(device):
    arguments = {**attention_arguments(device), "query_start_loc": None}
    refused("attention", arguments, "block_table", "num_seqs=5 (from query), got [3, 2]")


@pytest.mark.parametrize("start", [-1, 6])
def test_query_start_loc_is_checked_where_there_are_no_sequences(start):
    arguments = attention_arguments(torch.device("cpu"))
    arguments |= {name: arguments[name][:0] for name in ("block_table", "seq_lens")}
    arguments["query_start_loc"] = torch.tensor([0], dtype=torch.int32)
    assert not call("attention", arguments).any()
    arguments["query_start_loc"] += start
    refused("attention", arguments, "query_start_loc[0]", f"0 to num_tokens=5, got {start}")


@pytest.mark.parametrize("window", [4, 2**31, 2**63 - 1])
def test_block_ids_are_checked_where_tokens_precede_the_sequence(window):
    """A sequence of 1 with 5 tokens, and windows with which positions could overflow."""
    arguments = attention_arguments(torch.device("cpu"))
    arguments |= {"query_start_loc": torch.tensor([0, 0, 5, 5]).int(), "window": window}
    arguments["seq_lens"][1] = 1
    call("attention", arguments)
    arguments["block_table"][1, 0] = 10**9
    refused("attention", arguments, "block_table[1, 0]", "got 1000000000")


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("scale", 1e300, "from -1e30 to 1e30, got 1e+300"),
        ("scale", -3e38, "from -1e30 to 1e30, got -3e+38"),
        ("softcap", 1e-60, "from 1e-30 to 1e30, got 1e-60"),
        ("softcap", 1e-40, "from 1e-30 to 1e30, got 1e-40"),
        ("softcap", 3e38, "from 1e-30 to 1e30, got 3e+38"),
        ("softcap", 1e300, "from 1e-30 to 1e30, got 1e+300"),
    ],
)
def test_numbers_beyond_float32(name, number, expected, device):
    refused("attention", {**attention_arguments(device), name: number}, name, expected)


def test_scale_over_softcap_beyond_float32(device):
    arguments = {**attention_arguments(device), "scale": -1e10, "softcap": 1e-25}
    refused("attention", arguments, "softcap", "at least scale / 1e30 = 1e-20, got 1e-25")


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_the_least_and_the_largest_softcap(softcap, device):
    arguments = attention_arguments(device)
    # All scores within 1e-30 of each other, and all as they were.
    options = {"scale": 0.0} if softcap < 1 else {}
    expected = call("attention", {**arguments, **options})
    torch.testing.assert_close(call("attention", {**arguments, "softcap": softcap}), expected)


def test_wrong_python_types():
    right = attention_arguments(torch.device("cpu"))
    for name, value in (("kv_cache", [1]), ("window", 1.5), ("scale", "a")):
        # Not the name alone: PyTorch's message ends with the whole declaration.
        with pytest.raises(RuntimeError, match=f"for argument '{name}'"):
            ops.attention(**{**right, name: value})
    refused("attention", {**right, "query": None}, "query", "must be a tensor, got None")


TRAP = """
import torch, paged_ops
cache = torch.zeros(4, 2, 16, 1, 64, device="cuda")
table = torch.tensor([[99]], dtype=torch.int32, device="cuda")
lens = torch.tensor([5], dtype=torch.int32, device="cuda")
paged_ops.ops.attention(torch.zeros(1, 1, 64, device="cuda"), cache, table, lens)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_bad_value_on_a_gpu_is_trapped_on_request():
    """In a process of its own: a trap ends the CUDA context."""
    environment = {**os.environ, "PAGED_OPS_CHECK": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TRAP], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    message = "paged::attention: block_table[0, 0] must be a block id below 4, got 99"
    assert message in run.stdout + run.stderr
