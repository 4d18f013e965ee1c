"""A Llama-family decoder over a paged KV cache, read from the embedding to the logits.

One forward serves prefill, decode and both mixed: the tokens of all sequences lie end to end on
one axis, and the batch says where each sequence starts, how long it is and where its keys and
values go.

The model: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.
Shapes: T tokens of this call, S sequences, E hidden size, F feed-forward size, V vocabulary,
Q query heads, H key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from matvec import matvec, takes
from torch import Tensor, nn

from paged_ops import ops

if TYPE_CHECKING:
    from paged_ops import Batch


@dataclass(frozen=True)
class Config:
    """The sizes of a model; examples/load.py reads them from a checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # with a "rope_type": see rope_frequencies
    qkv_bias: bool = False
    tied_embeddings: bool = False
    window: int = -1  # keys a query sees, its own included; -1: all


class Rotation(NamedTuple):
    """cos and sin of each token's angles, float32 [T, 1, D], the same in every layer.

    sin is negative in the first half, as the other channel of a pair counts there.
    """

    cos: Tensor
    sin: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Linear(nn.Linear):
    """norm(x) times the weights, plus what is added; one row's by a kernel that does all of it."""

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, added: Tensor | None = None
    ) -> Tensor:
        if takes(x, self.weight):
            scales, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            product = matvec(x, self.weight, scales, eps, added)
            return product if self.bias is None else product + self.bias
        product = super().forward(x if norm is None else norm(x))
        return product if added is None else added + product


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position of each pair of channels, float32 [D / 2] (Su et al., 2021)."""
    channels = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    exponents = channels / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    match scaling["rope_type"]:
        case "linear":
            return frequencies / scaling["factor"]
        case "llama3":
            return _stretch_low_frequencies(frequencies, scaling)
        case "factors":
            return frequencies / torch.tensor(scaling["factors"], device=device)
        case other:
            raise ValueError(f"rope_type must be linear, llama3 or factors, got {other!r}")


def _stretch_low_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: turns longer than the trained context slow down by `factor`, short ones stay.

    Between the two limits the slowdown is interpolated by the turns made in the trained context.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotation_at(positions: Tensor, frequencies: Tensor) -> Rotation:
    """What turns the channels of tokens at these positions, int64 [T]."""
    angles = positions[:, None, None] * frequencies  # [T, 1, D / 2]
    cos, sin = angles.cos(), angles.sin()
    # In one tensor, because Inductor stores that, but would compute a cos alone in each head again.
    return Rotation(*torch.cat((cos, cos, -sin, sin), -1).chunk(2, -1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (channel i, channel i + D / 2) of x [T, heads, D] by their token's angles."""
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, dims=-1)  # of its pair
    return (wide * rotation.cos + other * rotation.sin).to(x.dtype)


class Attention(nn.Module):
    """x + out(attention(norm(x))), with grouped queries.

    Keys and values go to the cache, and are read from there.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.window = config.window
        self.head_size = config.head_size
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        query_size = config.num_heads * config.head_size
        qkv_size = sum(self.heads) * config.head_size
        self.qkv = Linear(config.hidden_size, qkv_size, bias=config.qkv_bias)
        self.out = Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, norm: RMSNorm, rotation: Rotation, kv_cache: Tensor, batch: Batch
    ) -> Tensor:
        query, key, value = self.projected(x, norm, rotation).split(self.heads, dim=1)
        return self.out(self.attend(query, key, value, kv_cache, batch).flatten(1), added=x)

    def projected(self, x: Tensor, norm: RMSNorm, rotation: Rotation) -> Tensor:
        """Queries and keys, rotated, and values: [T, Q + 2 H, D]."""
        weight, turned = self.qkv.weight, sum(self.heads[:2])
        if takes(x, weight) and self.qkv.bias is None:
            cos, sin = rotation.cos, rotation.sin
            qkv = matvec(x, weight, norm.weight, norm.eps, cos=cos, sin=sin, turned_heads=turned)
            return qkv.unflatten(-1, (-1, self.head_size))
        qkv = self.qkv(x, norm).unflatten(-1, (-1, self.head_size))
        # Values stay as they are, but pass through too: all of it is one kernel.
        turns = torch.arange(sum(self.heads), device=x.device)[:, None] < turned
        return torch.where(turns, rotate(qkv, rotation), qkv)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: Batch
    ) -> Tensor:
        """Keep the new keys and values, and attend to all that are kept: [T, Q, D]."""
        ops.write_kv(key, value, kv_cache, batch.slot_mapping)
        return ops.attention(
            query,
            kv_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            window=self.window,
        )


class FeedForward(nn.Module):
    """x + down(silu(gate(y)) * up(y)) for y = norm(x): SwiGLU.

    Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return self.down(self.gated(x, norm), added=x)

    def gated(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """What goes down: [T, F]."""
        if takes(x, self.gate_up.weight):
            return matvec(x, self.gate_up.weight, norm.weight, norm.eps, gated=True)
        gate, up = self.gate_up(x, norm).chunk(2, dim=-1)
        return F.silu(gate) * up


class Layer(nn.Module):
    """Attention, then the feed-forward network, each with a norm before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation, kv_cache: Tensor, batch: Batch) -> Tensor:
        x = self.attention(x, self.attention_norm, rotation, kv_cache, batch)
        return self.feed_forward(x, self.feed_forward_norm)


class Decoder(nn.Module):
    """The whole model: from token ids to the logits of each sequence's next token.

    Attributes:
        frequencies: what rope_frequencies gives, float32 whatever the weights are. Not computed in
            each step: a compiled one had a kernel for it that reads nothing, and such a kernel does
            not wait for the one before it where kernels are launched early.
    """

    frequencies: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        frequencies = rope_frequencies(config, torch.device("cpu"))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    @classmethod
    def without_weights(cls, config: Config, device: torch.device) -> Decoder:
        """A model for this device whose weights take no memory until they are assigned."""
        with torch.device("meta"):
            model = cls(config)
        model.frequencies = model.frequencies.to(device)
        return model

    def assign_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take these tensors for the weights, by name, without a copy; they are not trained."""
        self.load_state_dict(weights, assign=True)
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, caches: Sequence[Tensor], batch: Batch) -> Tensor:
        """Write the tokens' keys and values to the caches and predict what follows.

        Args:
            tokens: int64 [T], the new tokens of all sequences, end to end.
            caches: one kv_cache per layer, [num_blocks, 2, block_size, H, D], written in place.
            batch: where the tokens belong, from PagedAttentionManager.batch; query_start_loc may be
                None if each sequence has exactly one token.

        Returns:
            float32 [S, V]: the logits after the last token of each sequence.
        """
        rotation = rotation_at(batch.positions, self.frequencies)
        x = self.embedding(tokens)  # [T, E]
        for layer, kv_cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotation, kv_cache, batch)
        if batch.query_start_loc is not None:
            x = x[batch.query_start_loc[1:] - 1]  # [S, E]
        return self.head(x, self.norm).float()
