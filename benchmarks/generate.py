"""How fast is a decode step: the compiled loop, the same model run eagerly, and the memory's limit.

    python benchmarks/generate.py --dtype bfloat16 --batch 1 4 8 --context 64

Each step decodes one token of every sequence with the default model of the examples. The limit is
the time in which the machine reads the same weights and cached keys and values once, measured in
turns with the steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, median_ms

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from decoder import Decoder
from generate import DTYPES, compile_step, decode_step
from load import load

from paged_ops import PagedAttentionManager


def make_manager(model: Decoder, batch: int, context: int, steps: int) -> PagedAttentionManager:
    """Sequences of lengths around `context`, with room for `steps` more tokens each."""
    config, weight = model.config, model.embedding.weight
    longest = context + batch + steps
    manager = PagedAttentionManager(
        batch,
        config.num_kv_heads,
        config.head_size,
        16,
        batch * (longest // 16 + 1),
        weight.device,
        weight.dtype,
        config.num_layers,
        max_seq_len=longest,
    )
    for seq_id in range(batch):
        manager.add_sequence(seq_id, context + seq_id)
    for cache in manager.caches:
        cache.normal_()
    return manager


def steps_of(
    step: Callable[..., torch.Tensor], model: Decoder, batch: int, context: int, steps: int
) -> Callable[[], object]:
    """A call that decodes one more token of each sequence in a cache of its own."""
    manager = make_manager(model, batch, context, steps)
    ids = list(range(batch))
    tokens = torch.randint(0, model.config.vocab_size, (max(batch, 2),), device=manager.device)

    def call() -> None:
        manager.append(ids)
        step(model, tokens, manager.caches, manager.batch(ids, pad_to=2)).argmax(-1).tolist()

    return call


def read_of(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A call that reads so many bytes once, and does nothing else."""
    memory = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    return lambda: memory.sum()


def measure(model: Decoder, batch: int, context: int, rounds: int) -> dict[str, float]:
    device = model.embedding.weight.device
    config, element = model.config, model.embedding.weight.element_size()
    weights = sum(each.nbytes for each in model.parameters())
    token = 2 * config.num_layers * config.num_kv_heads * config.head_size * element
    num_bytes = weights + batch * context * token
    steps = 2 * rounds + 4  # two calls a turn, and two that compile
    compiled = steps_of(compile_step(device), model, batch, context, steps)
    for _ in range(2):  # compiles
        compiled()
    contenders = {
        "compiled": compiled,
        "eager": steps_of(decode_step, model, batch, context, steps),
        "read": read_of(num_bytes, device),
    }
    times = interleaved(contenders, device, rounds)
    row = {name: median_ms(seconds) for name, seconds in times.items()}
    return {
        "batch": batch,
        "context": context,
        **{f"{name}_ms": value for name, value in row.items()},
        "tokens_per_second": batch / row["compiled"] * 1e3,
        "over_eager": row["eager"] / row["compiled"],
        "share_of_read": row["read"] / row["compiled"],
    }


def print_table(rows: list[dict[str, float]]) -> None:
    columns = list(rows[0])
    print(" | ".join(f"{name:>17}" for name in columns))
    for row in rows:
        print(" | ".join(f"{row[name]:17.2f}" for name in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    arguments = parser.parse_args()
    model = load(arguments.model, DTYPES[arguments.dtype], torch.device(arguments.device)).model
    with torch.no_grad():
        rows = [
            measure(model, batch, arguments.context, arguments.rounds) for batch in arguments.batch
        ]
    print_table(rows)
    if arguments.json:
        machine = {"cpu": platform.processor(), "threads": torch.get_num_threads()}
        record = {"torch": torch.__version__, "machine": machine, **vars(arguments), "rows": rows}
        arguments.json.write_text(json.dumps(record, default=str, indent=2))


if __name__ == "__main__":
    main()
