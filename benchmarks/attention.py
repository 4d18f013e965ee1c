"""How fast is paged attention: this project, the memory's limit, and every other kernel installed.

    python benchmarks/attention.py --json attention.json --png attention.png

All contenders of a case get the same keys, values, queries and block tables, take turns, and are
checked against attention in float32 before they are timed. Each call finds its bytes outside of the
caches: calls rotate over several batches. On a GPU a contender is one CUDA graph of all its calls.
The *ceiling* of a case is the fastest plain read of the same bytes that was found in the same run
(for writes, the fastest copy), and a *share* is the ceiling's time over a contender's. *Ratio* is
the time of the best peer that reads a cache of blocks over ours.

Plans and metadata that a peer makes on the host or ahead of its call are not timed, which favours
it. Operators of vLLM are taken from an installed vllm, or from a folder with its libraries
(--vllm-libs); the other peers are imported. What is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from cases import (
    FLOAT8,
    FLOPS_PER_BYTE,
    Batch,
    BlockPairs,
    Case,
    Rows,
    cpu_cases,
    cuda_cases,
    make_batch,
    make_pairs,
    make_rows,
    relative_error,
)
from peers import (
    COPIERS,
    WRITERS,
    Peer,
    Unsupported,
    attention_peers,
    copied_error,
    load_vllm,
    ours,
    written_error,
)
from reads import block_copies, reads, row_copies
from report import OURS, Result, Table, machine, print_case, print_summary, write_json, write_png
from timing import Call, cuda_graph, host_seconds, in_turn, interleaved, median_ms

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from options import DEFAULT_DEVICE, Parser, integer, usable_device

COLD_BYTES = {"cuda": 600e6, "cpu": 1200e6}  # several times the last cache
REPLAY_BYTES = 2e9  # in one CUDA graph: its launch is then not seen

Contenders = dict[str, list[Call]]
Results = dict[str, Result]
Moved = TypeVar("Moved", Rows, BlockPairs)


def first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"[:160]


def checked(prepare: Callable[[Batch], Call], batches: Sequence[Batch]) -> tuple[list[Call], float]:
    """The prepared calls of a contender, one for each batch, and its error on the first."""
    calls = [prepare(batch) for batch in batches]
    batches[0].out.fill_(math.nan)
    error = relative_error(batches[0], calls[0]())
    tolerance = 8e-2 if batches[0].kv_cache.dtype == FLOAT8 else 1e-2
    if not error <= tolerance:
        raise ArithmeticError(f"wrong result: relative error {error:.1e}")
    return calls, error


def attention_contenders(
    peers: Sequence[Peer], batches: Sequence[Batch]
) -> tuple[Contenders, Results]:
    """The calls of all contenders that run and are right, and a row for each contender."""
    calls: Contenders = {}
    results: Results = {}
    for peer in [Peer(OURS, ours), *peers]:
        results[peer.name] = row = Result(compared=peer.compared)
        try:
            calls[peer.name], row.error = checked(peer.prepare, batches)
        except Exception as error:  # whatever a peer raises, the others are measured
            row.failure = first_line(error)
    return calls, results


def write_contenders(
    writers: Mapping[str, Callable[[Moved], Call]],
    error_of: Callable[[Moved, Call], float],
    batches: Sequence[Moved],
) -> tuple[Contenders, Results]:
    """The same for what writes into the cache."""
    calls: Contenders = {}
    results: Results = {}
    for name, prepare in writers.items():
        results[name] = row = Result()
        try:
            prepared = [prepare(batch) for batch in batches]
            row.error = error_of(batches[0], prepared[0])
            if row.error:
                raise ArithmeticError(f"wrong result: a share of {row.error:.1e}")
            calls[name] = prepared
        except Exception as error:  # whatever a peer raises, the others are measured
            row.failure = first_line(error)
    return calls, results


def read_ceilings(batches: Sequence[Batch]) -> Contenders:
    ceilings: Contenders = {}
    for batch in batches:
        for name, call in reads(batch.kv_cache, batch.case.kv_bytes).items():
            ceilings.setdefault(name, []).append(call)
    return ceilings


def timed_us(
    contenders: Mapping[str, list[Call]], case: Case, device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of one call of each contender; and what failed while it was captured."""
    runs: dict[str, Call] = {}
    lengths: dict[str, int] = {}
    failures: dict[str, str] = {}
    work = max(case.kv_bytes, case.flops / FLOPS_PER_BYTE)
    for index, (name, calls) in enumerate(contenders.items()):
        if device.type != "cuda":
            runs[name], lengths[name] = in_turn(calls, index), 1
            continue
        chain = calls * max(1, round(REPLAY_BYTES / work / len(calls)))
        try:
            runs[name], lengths[name] = cuda_graph(chain), len(chain)
        except Exception as error:  # a peer that cannot be captured
            failures[name] = first_line(error)
    times = interleaved(runs, device, rounds)
    return {name: 1e3 * median_ms(each) / lengths[name] for name, each in times.items()}, failures


def measure(case: Case, device: torch.device, rounds: int, flex: bool) -> Table:
    torch.manual_seed(0)
    count = min(40, max(2, math.ceil(COLD_BYTES[device.type] / case.kv_bytes)))
    if case.measures == "write":
        rows = [make_rows(case, device) for _ in range(count)]
        calls, results = write_contenders(WRITERS, written_error, rows)
        ceilings = {"copy": row_copies(rows)}
    elif case.measures == "copy":
        pairs = [make_pairs(case, device) for _ in range(count)]
        calls, results = write_contenders(COPIERS, copied_error, pairs)
        ceilings = {"copy": block_copies(pairs)}
    else:
        batches = [make_batch(case, device) for _ in range(count)]
        calls, results = attention_contenders(attention_peers(device, flex), batches)
        ceilings = read_ceilings(batches)
    us, failures = timed_us({**ceilings, **calls}, case, device, rounds)
    for name in calls:
        results[name].us = us.get(name, math.nan)
        results[name].failure = failures.get(name, "")
    ceiling = min((name for name in ceilings if name in us), key=us.__getitem__)
    moved = case.kv_bytes if case.measures == "attention" else 2 * case.kv_bytes
    return Table(case, moved, ceiling, us[ceiling], results)


def host_costs(device: torch.device, peers: Sequence[Peer]) -> dict[str, float]:
    """Microseconds of one eager call on a small batch: on a GPU, what it costs the host."""
    batch = make_batch(Case("small", (64,) * 4), device)
    arguments = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens)
    calls: dict[str, Call] = {
        "attention": lambda: torch.ops.paged.attention(*arguments),
        "attention_out": lambda: torch.ops.paged.attention_out(*arguments, out=batch.out),
    }
    for peer in [Peer(OURS, ours), *peers]:
        try:
            calls[peer.name] = checked(peer.prepare, [batch])[0][0]
        except Exception as error:  # whatever a peer raises, the others are measured
            print(f"{peer.name}: {first_line(error)}")
    return {name: 1e6 * host_seconds(call, device) for name, call in calls.items()}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", type=usable_device, default=DEFAULT_DEVICE)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=integer(1), default=15, help="of which the median counts")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too: it compiles long")
    parser.add_argument("--vllm-libs", type=Path, help="a folder with a vllm wheel's libraries")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--png", type=Path, help="draw the shares of the ceiling here")
    arguments = parser.parse_args()
    cases = cuda_cases() if arguments.device.type == "cuda" else cpu_cases()
    named = {case.name: case for case in cases}
    names = ",".join(arguments.cases or named).split(",")  # by commas too
    unknown = [name for name in names if name not in named]
    if unknown:
        parser.error(f"argument --cases: must be of {', '.join(named)}, got {unknown[0]}")
    arguments.cases = [named[name] for name in names]
    return arguments


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    about = machine(device)
    load_vllm(arguments.vllm_libs)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    tables: list[Table] = []
    for case in arguments.cases:
        try:
            tables.append(measure(case, device, arguments.rounds, arguments.flex))
        except RuntimeError as error:  # too large for this machine, or a peer broke the device
            print(f"\n{case.name}: {first_line(error)}")
            continue
        print_case(tables[-1])
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if arguments.json:
            write_json(arguments.json, tables, {}, about)
    print_summary(tables)
    host_us = host_costs(device, attention_peers(device, arguments.flex))
    print("\none small eager call, us: " + ", ".join(f"{k} {v:.1f}" for k, v in host_us.items()))
    if arguments.json:
        write_json(arguments.json, tables, host_us, about)
    if arguments.png:
        write_png(arguments.png, tables, about)


if __name__ == "__main__":
    main()
