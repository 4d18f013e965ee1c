"""PagedAttention as PyTorch operators, with a block manager that supplies the cache.

``paged_ops.ops`` holds the typed functions over ``torch.ops.paged.*``; ``PagedAttentionManager``
owns the cache tensors and block tables. Importing the package loads the operators.
"""

from pathlib import Path

import torch

_library = next(Path(__file__).parent.glob("_C*.so"), None)
if _library is None:
    raise ImportError(
        "paged_ops is not built here; run: pip install --no-build-isolation -e . "
        "(or, outside of the source folder, install it)"
    )
torch.ops.load_library(_library)

from paged_ops import _fake as _fake  # noqa: E402
from paged_ops import ops  # noqa: E402
from paged_ops._block_manager import BlockManager, OutOfBlocks, StepBuffers  # noqa: E402
from paged_ops.manager import Batch, PagedAttentionManager  # noqa: E402

__all__ = ["Batch", "BlockManager", "OutOfBlocks", "PagedAttentionManager", "StepBuffers", "ops"]
