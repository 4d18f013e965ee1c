"""Devices, how close a result has to be, and how processes that share the tests share the cores."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from torch import Tensor

# Relative L2 error against float64 that a kernel with float32 sums may have. bfloat16 and float16
# round the output (and, on the matrix units, the probabilities); float32 rounds sums alone.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}


MOST_WORKERS = 8  # each imports torch and transformers, and loads models


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `pytest -n auto` stands for."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[object]) -> None:
    """Two threads at least, so that every test still runs the kernels side by side.

    Those that wait for work sleep, else they would keep the cores from the other workers.
    """
    threads = max(2, len(os.sched_getaffinity(0)) // len(specs))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each reason to skip, or one missing tool hides among the tests that need a GPU."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def assert_accurate(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Both have the same infinities, no NaN, and a small relative L2 error."""
    actual = actual.detach().cpu().double()
    assert actual.shape == expected.shape
    assert not expected.isnan().any(), "nothing equals NaN, so this would compare nothing"
    assert not actual.isnan().any(), f"NaN at {actual.isnan().nonzero()[0].tolist()}"
    finite = ~expected.isinf()
    assert torch.equal(finite, ~actual.isinf())
    assert torch.equal(actual[~finite], expected[~finite])  # of the same sign
    difference = (actual - expected)[finite]
    error = difference.norm() / expected[finite].norm().clamp_min(1e-30)
    if not error <= MAX_ERROR[dtype]:
        worst = torch.where(finite, actual - expected, 0).abs().argmax()
        index = torch.unravel_index(worst, actual.shape)
        raise AssertionError(
            f"relative L2 error {error:.2e} > {MAX_ERROR[dtype]:.0e}; worst at "
            f"{[int(i) for i in index]}: {actual[index]:.6g}, expected {expected[index]:.6g}"
        )
