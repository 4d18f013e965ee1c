"""Every instruction set of the machine is right; no result depends on what runs beside it."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, Inputs, expected, make_inputs, random_case
from conftest import assert_accurate

from paged_ops import ops

TESTS = Path(__file__).parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LONG = Case(seq_lens=(1500, 3, 0, 700, 64), num_heads=8, num_kv_heads=2)
MIXED = Case(seq_lens=(900, 40, 300), query_lens=(300, 40, 1), num_heads=8, num_kv_heads=2)


def run_with(instruction_set: str, code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the kernels are chosen once."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env={
            **os.environ,
            "PAGED_OPS_CPU": instruction_set,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def refusal() -> str:
    call = "ops.merge_states(*[torch.zeros(1, 1, 8), torch.zeros(1, 1)] * 2)"
    return (
        run_with("none-such", f"import torch; from paged_ops import ops; {call}")
        .stderr.strip()
        .splitlines()[-1]
    )


def check_case(case: Case) -> None:
    inputs = make_inputs(case)
    out, lse = ops.attention_lse(*inputs.args, **inputs.options)
    expected_out, expected_lse = expected(inputs)
    assert_accurate(out, expected_out, case.dtype)
    assert_accurate(lse, expected_lse, case.dtype)


def check_random_configurations() -> None:
    """What each instruction set runs in its process."""
    for seed in range(1000, 1040):
        check_case(random_case(seed))


def check_row_counts() -> None:
    """Rows of a KV head, which decide how keys are multiplied, over blocks of whole and of broken
    tiles."""
    for group_size, query_len in (
        (1, 1),
        (3, 1),
        (4, 1),
        (5, 1),
        (8, 1),
        (8, 2),
        (17, 1),
        (4, 8),
        (3, 11),
        (2, 65),
    ):
        for block_size, head_size, window in (
            (16, 128, -1),
            (32, 96, 41),
            (16, 80, 41),
            (5, 64, -1),
        ):
            case = Case(
                seq_lens=(200, 70),
                query_lens=(query_len, query_len),
                num_heads=2 * group_size,
                num_kv_heads=2,
                head_size=head_size,
                block_size=block_size,
                dtype=torch.bfloat16,
                window=window,
            )
            check_case(case)


def check_infinite_values() -> None:
    """They reach their own channel, and no other."""
    for group_size, head_size, block_size in ((1, 128, 16), (4, 128, 16), (8, 80, 5), (12, 64, 16)):
        case = Case(
            seq_lens=(200, 70),
            num_heads=2 * group_size,
            num_kv_heads=2,
            head_size=head_size,
            block_size=block_size,
            dtype=torch.bfloat16,
        )
        inputs = make_inputs(case)
        block = inputs.block_table[0, 9 // block_size]
        inputs.kv_cache[block, 1, 9 % block_size, :, 3] = torch.inf
        out, _ = ops.attention_lse(*inputs.args)
        expected_out, _ = expected(inputs)
        assert expected_out.isinf().sum() == 2 * group_size
        assert_accurate(out, expected_out, case.dtype)


def check_float8_values() -> None:
    """Each float8, as an element of the only key of a sequence and of its value, in few rows and
    many."""
    value = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    key = value.float().nan_to_num(0.0)
    kv_cache = torch.stack((key.to(value.dtype), value))[None, :, None, None]
    block_table, seq_lens = torch.zeros(256, 1, dtype=torch.int32), torch.ones(256).int()
    for dtype, num_heads in itertools.product((torch.bfloat16, torch.float32), (1, 4, 24)):
        query = torch.eye(256, dtype=dtype)[:, None].repeat(1, num_heads, 1)
        out, lse = ops.attention_lse(query, kv_cache, block_table, seq_lens, scale=1.0)
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(out, value.to(dtype).expand_as(out), **exact)
        torch.testing.assert_close(lse, key[:, None].expand_as(lse), rtol=1e-6, atol=1e-7)


def test_every_instruction_set():
    names = re.findall(r"\w+", refusal().split("must be one of:")[1].split(";")[0])
    assert names[-1] == "scalar"
    checks = ("random_configurations", "row_counts", "infinite_values", "float8_values")
    calls = "; ".join(f"t.check_{check}()" for check in checks)
    for name in names:
        result = run_with(name, f"import test_cpu_kernels as t; {calls}")
        assert result.returncode == 0, f"{name}: {result.stderr[-2000:]}"


def test_unknown_instruction_set():
    assert "PAGED_OPS_CPU must be one of: " in refusal()
    assert "got none-such" in refusal()


@pytest.fixture
def one_thread():
    """Sets one thread when called, and puts the number back afterwards."""
    threads = torch.get_num_threads()
    yield lambda: torch.set_num_threads(1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [LONG, MIXED], ids=["decode", "mixed"])
def test_threads_change_no_bit(case, dtype, one_thread):
    inputs = make_inputs(Case(**{**vars(case), "dtype": dtype}))
    with_all = ops.attention_lse(*inputs.args)
    one_thread()
    with_one = ops.attention_lse(*inputs.args)
    assert all(map(torch.equal, with_all, with_one))


def alone(inputs: Inputs, seq: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sequence's rows of query, and out and lse when it is the whole batch."""
    starts = inputs.query_start_loc
    begin, end = (seq, seq + 1) if starts is None else (int(starts[seq]), int(starts[seq + 1]))
    rows = torch.arange(begin, end)
    own_starts = None if starts is None else torch.tensor([0, end - begin], dtype=torch.int32)
    out, lse = ops.attention_lse(
        inputs.query[begin:end],
        inputs.kv_cache,
        inputs.block_table[seq : seq + 1],
        inputs.seq_lens[seq : seq + 1],
        own_starts,
    )
    return rows, out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [LONG, MIXED], ids=["decode", "mixed"])
def test_the_batch_changes_no_bit(case, dtype):
    inputs = make_inputs(Case(**{**vars(case), "dtype": dtype}))
    out, lse = ops.attention_lse(*inputs.args)
    for seq in range(len(case.seq_lens)):
        rows, own_out, own_lse = alone(inputs, seq)
        assert torch.equal(out[rows], own_out)
        assert torch.equal(lse[rows], own_lse)
