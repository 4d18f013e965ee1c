"""A manager of blocks of 16 for the examples' models, where their weights are."""

from __future__ import annotations

from decoder import Decoder

from paged_ops import PagedAttentionManager


def manager_for(
    model: Decoder, num_sequences: int, num_blocks: int = 64, watermark: int = 0
) -> PagedAttentionManager:
    config, weight = model.config, model.embedding.weight
    return PagedAttentionManager(
        num_sequences,
        config.num_kv_heads,
        config.head_size,
        16,
        num_blocks,
        weight.device,
        weight.dtype,
        config.num_layers,
        watermark=watermark,
    )
