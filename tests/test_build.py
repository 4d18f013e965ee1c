"""setup.py says in one sentence what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(tmp_path: Path, torch_module: str | None, **environment: str) -> str:
    """What a build that cannot start prints; `torch_module` stands in for torch."""
    if torch_module is not None:
        (tmp_path / "torch.py").write_text(torch_module)
        environment["PYTHONPATH"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("torch_module", "environment", "sentence"),
    [
        (
            "raise ImportError",
            {},
            "torch is needed to build; run: pip install torch 'setuptools>=77'",
        ),
        ("__version__ = '2.9.1+cpu'", {}, "torch 2.10 or newer is needed, found 2.9.1+cpu."),
        (None, {"CXX": "no-such-compiler"}, "no-such-compiler is not on the PATH"),
        (None, {"PAGED_OPS_CUDA": "yes"}, "PAGED_OPS_CUDA must be auto, 1 or 0, got 'yes'."),
    ],
    ids=["no torch", "old torch", "no compiler", "bad choice"],
)
def test_one_sentence(tmp_path, torch_module, environment, sentence):
    line = build(tmp_path, torch_module, **environment)
    assert line.startswith("paged_ops: ")
    assert sentence in line


def test_cuda_is_demanded_and_missing(tmp_path):
    """With a PATH that has a compiler and no nvcc."""
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    environment = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path), "PAGED_OPS_CUDA": "1"}
    line = build(tmp_path, None, **environment)
    assert "PAGED_OPS_CUDA=1 needs nvcc" in line
