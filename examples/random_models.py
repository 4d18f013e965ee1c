"""Models by their names on the command line: checkpoints, and random weights of known shapes.

Random weights are made where they are to run, for measuring speed.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import torch
from decoder import Config, Decoder, RMSNorm
from load import Checkpoint, CheckpointError, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

RANDOM_PREFIX = "random:"  # of a model's name on the command line

# The matrices of the models that have these names; Qwen 3 also normalises its queries and keys.
SHAPES = {
    "tiny": Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        max_positions=4096,
    ),
    "llama-3-8b": Config(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        max_positions=131072,
        rope_theta=500000.0,
    ),
    "qwen3-32b": Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_layers=64,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        max_positions=131072,
        rope_theta=1000000.0,
    ),
    "llama-3-70b": Config(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        max_positions=131072,
        rope_theta=500000.0,
    ),
}


MODELS = "a checkpoint folder, a GGUF file or, with random weights to measure speed, " + ", ".join(
    RANDOM_PREFIX + name for name in SHAPES
)


def load_model(model: str | None, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """One of MODELS, or the default model; raises CheckpointError."""
    if model is not None and model.startswith(RANDOM_PREFIX):
        return random_checkpoint(model.removeprefix(RANDOM_PREFIX), dtype, device)
    return load(model and Path(model), dtype, device)


def random_decoder(
    config: Config, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Decoder:
    """Weights that keep the size of what passes through them, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    model = Decoder.without_weights(config, device)
    weights = {
        name: torch.empty_like(weight, dtype=dtype, device=device)
        for name, weight in model.state_dict().items()
    }
    model.assign_weights(weights)
    for module in model.modules():
        match module:
            case RMSNorm():
                module.weight.fill_(1)
            case nn.Linear():
                module.weight.normal_(std=1 / sqrt(module.in_features), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            case nn.Embedding():
                module.weight.normal_(generator=generator)
    return model


def random_checkpoint(name: str, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """A model by the name of its shapes, which reads bytes, writes numbers and never stops."""
    if name not in SHAPES:
        raise CheckpointError(f"there are no shapes named {name}, only {', '.join(SHAPES)}")
    config = SHAPES[name]
    model = random_decoder(config, dtype, device)
    return Checkpoint(model, byte_tokenizer(config.vocab_size), frozenset(), render_chat=None)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A token for each byte; the ids after these are written as numbers."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{index}>" for index in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
