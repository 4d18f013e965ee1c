"""The CUDA kernels, compiled for the CPU and run thread by thread, pass the operators' own tests.

Copies and products end as late as their waits allow, so a wait that is missing is found. What a GPU
adds (memory order, registers, the stream) only the tests marked `gpu` see.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
HOST_ONLY = {"register", "device"}  # take a stream or a device
SELECTION = (
    "cpu and (masks or dtypes or block_sizes or empty_rows or nan or random or cache_ops"
    " or query_lens or options_of_cut or few_rows or batch_invariant or prefill)"
)


find_cuda_root = runpy.run_path(str(ROOT / "setup.py"))["find_cuda_root"]


def on_all_cores(call: Callable[..., object], many: Iterable[Any]) -> None:
    """Each call waits for a process; the first error is raised when all have ended."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, many))


def run_compiler(command: list[str]) -> None:
    subprocess.run(command, check=True)


def build(folder: Path, cuda_root: str) -> None:
    """paged_ops with the emulated library in `folder`."""
    sources = Path(__file__).parent / "cuda_emulation"
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for instructions in sources.glob("*.cuh"):
        shutil.copy(instructions, csrc / "cuda")
    includes = [f"-I{path}" for path in (f"{cuda_root}/include", csrc, *include_paths())]
    compiler = [os.environ.get("CXX", "g++"), *FLAGS, *includes]
    commands, objects = [], []
    kernels = [path for path in csrc.glob("cuda/**/*.cu") if path.stem not in HOST_ONLY]
    hosts = [*csrc.glob("*.cpp"), *sources.glob("*.cpp")]
    for source in (*kernels, *hosts):
        objects.append(str(folder / f"{source.stem}.{len(objects)}.o"))
        emulated = ["-include", str(sources / "emulation.h"), "-x", "c++"]
        options = emulated if source.suffix == ".cu" else []
        commands.append([*compiler, *options, "-c", str(source), "-o", objects[-1]])
    on_all_cores(run_compiler, commands)
    package = folder / "paged_ops"
    shutil.copytree(ROOT / "paged_ops", package, ignore=shutil.ignore_patterns("_C*.so"))
    libraries = [f"-L{path}" for path in library_paths()]
    target = ["-shared", "-o", str(package / "_C.abi3.so"), *objects]
    run_compiler([compiler[0], *target, *libraries, "-ltorch_cpu", "-lc10"])


@dataclass(frozen=True)
class Run:
    """Tests, and what they are told of the device."""

    files: tuple[str, ...]
    selection: str
    environment: dict[str, str] = field(default_factory=dict)


RUNS = [
    Run(("attention", "cache_ops"), SELECTION),
    Run(("matrix_units", "prefill"), SELECTION),
    Run(("prefill",), "cpu and not float8", {"EMULATED_WGMMA": "1"}),
    # Compute capability 8.6 has 99 KB of shared memory for a CTA: other kernels run there.
    Run(
        ("matrix_units",),
        "cpu and (head_sizes or options_of_cut or batch_invariant)",
        {"EMULATED_SHARED_MEMORY": "99"},
    ),
    Run(
        ("matrix_units",),
        "cpu and (short_shares or cut_alike or at_every_place or every_table)",
        {"EMULATED_MULTIPROCESSORS": "132"},
    ),
    # Several shares of one head each, and more CTAs if each has several heads.
    Run(("matrix_units",), "cpu and long_sequences", {"EMULATED_MULTIPROCESSORS": "18"}),
]


def run_tests(folder: Path, run: Run) -> None:
    files = [f"tests/test_{name}.py" for name in run.files]
    # Not captured: what the emulation says before it aborts.
    options = ["-q", "-s", "-p", "no:cacheprovider", "-k", run.selection]
    # The emulated kernels have one thread; those of the reference would only get in its way.
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **run.environment}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="switches fibers in x86-64 assembly")
@pytest.mark.skipif(
    find_cuda_root() is None, reason="needs nvcc's headers to run the CUDA kernels on the CPU"
)
def test_operators_on_emulated_kernels(tmp_path):
    build(tmp_path, find_cuda_root())
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    on_all_cores(partial(run_tests, tmp_path), RUNS)
