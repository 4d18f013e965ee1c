"""The CUDA kernels, compiled for the CPU and run thread by thread, pass the operators' own tests.

What a GPU adds (memory order, registers, the stream) only the tests marked `gpu` see.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
HOST_ONLY = {"register", "device"}  # take a stream or a device
SELECTION = (
    "cpu and (masks or dtypes or block_sizes or empty_rows or nan or random or cache_ops"
    " or query_lens or options_of_cut or few_rows or batch_invariant or prefill)"
)


find_cuda_root = runpy.run_path(str(ROOT / "setup.py"))["find_cuda_root"]


def compile_all(commands: list[list[str]]) -> None:
    """Two at a time."""
    for first in range(0, len(commands), 2):
        running = [subprocess.Popen(command) for command in commands[first : first + 2]]
        assert [process.wait() for process in running] == [0] * len(running)


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
    hosts = [*csrc.glob("*.cpp"), sources / "emulation.cpp", sources / "register.cpp"]
    for source in (*kernels, *hosts):
        objects.append(str(folder / f"{source.stem}.{len(objects)}.o"))
        emulated = ["-include", str(sources / "emulation.h"), "-x", "c++"]
        options = emulated if source.suffix == ".cu" else []
        commands.append([*compiler, *options, "-c", str(source), "-o", objects[-1]])
    compile_all(commands)
    package = folder / "paged_ops"
    shutil.copytree(ROOT / "paged_ops", package, ignore=shutil.ignore_patterns("_C*.so"))
    libraries = [f"-L{path}" for path in library_paths()]
    target = ["-shared", "-o", str(package / "_C.abi3.so"), *objects]
    compile_all([[compiler[0], *target, *libraries, "-ltorch_cpu", "-lc10"]])


def run_tests(folder: Path, names: tuple[str, ...], selection: str, **environment: str) -> None:
    files = [f"tests/test_{name}.py" for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selection],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="switches fibers in x86-64 assembly")
@pytest.mark.skipif(find_cuda_root() is None, reason="needs the headers of CUDA")
def test_operators_on_emulated_kernels(tmp_path):
    build(tmp_path, find_cuda_root())
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    run_tests(tmp_path, ("attention", "matrix_units", "prefill", "cache_ops"), SELECTION)
    # Compute capability 8.6 has 99 KB of shared memory for a CTA: other kernels run there.
    few = "cpu and (head_sizes or options_of_cut or batch_invariant)"
    run_tests(tmp_path, ("matrix_units",), few, EMULATED_SHARED_MEMORY="99")
    run_tests(tmp_path, ("prefill",), "cpu and not float8", EMULATED_WGMMA="1")
    many = "cpu and (short_shares or cut_alike or at_every_place)"
    run_tests(tmp_path, ("matrix_units",), many, EMULATED_MULTIPROCESSORS="132")
