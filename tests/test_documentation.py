"""The README's examples and the docstrings' run, and the package says what it contains."""

from __future__ import annotations

import doctest
import re
import subprocess
from pathlib import Path

import pytest
import torch

import paged_ops
from paged_ops import manager, ops

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("example", EXAMPLES, ids=["operators", "loop", "prefixes"])
def test_readme_example(example, tmp_path):
    path = tmp_path / "example.py"  # in a file: torch.compile reads the source
    path.write_text(example, encoding="utf-8")
    exec(compile(example, str(path), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("module", [ops, manager], ids=lambda module: module.__name__)
def test_docstrings(module):
    torch.manual_seed(0)
    names = {"torch": torch, **vars(module)}
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0


def test_library_loads_beside_any_torch():
    """It asks the loader for no CUDA library, and for libstdc++, through which errors pass."""
    library = next(Path(paged_ops.__file__).parent.glob("_C*.so"))
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    assert "libstdc++.so.6" in needed
    assert not [name for name in needed if "cuda" in name or "c10" in name or "python" in name]


def test_every_operator_has_a_typed_function():
    registered = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix("paged::") for name in registered if name.startswith("paged::")}
    assert operators == set(ops.__all__)
    assert all(getattr(ops, name).__doc__ for name in operators)
