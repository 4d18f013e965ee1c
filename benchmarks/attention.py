"""How fast is paged attention: this project, the memory's limit, and every other kernel installed.

    python benchmarks/attention.py --json attention.json --png attention.png

All contenders of a case get the same keys, values, queries and block tables, take turns, and are
checked against attention in float32 before they are timed. Each call finds its bytes outside of the
caches: calls rotate over several batches. On a GPU a contender is one CUDA graph of all its calls.
The *ceiling* of a case is the fastest plain read of the same bytes that was found in the same run
(for writes, the fastest copy), and a *share* is the ceiling's time over a contender's.

Plans and metadata that a peer makes on the host or ahead of its call are not timed, which favours
it. Operators of vLLM are taken from an installed vllm, or from a folder with its libraries
(--vllm-libs); the other peers are imported. What is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from cases import (
    FLOAT8,
    Batch,
    Case,
    Rows,
    cpu_cases,
    cuda_cases,
    make_batch,
    make_rows,
    relative_error,
)
from peers import WRITERS, Peer, Unsupported, all_peers, load_vllm, ours, written_error
from reads import reads
from timing import Call, cuda_graph, host_seconds, in_turn, interleaved, median_ms

OURS = "paged_ops"
COLD_BYTES = {"cuda": 600e6, "cpu": 200e6}  # several times the last cache
REPLAY_BYTES = 2e9  # in one CUDA graph: its launch is then not seen


@dataclass
class Result:
    """One contender: its time, or why it has none."""

    us: float = math.nan
    error: float = math.nan
    failure: str = ""
    paged: bool = True

    @property
    def timed(self) -> bool:
        return not math.isnan(self.us)


@dataclass
class Table:
    """All that was measured of one case."""

    case: Case
    num_bytes: int
    ceiling: str
    ceiling_us: float
    results: dict[str, Result] = field(default_factory=dict)

    def best_peer(self) -> str | None:
        names = [
            name
            for name, result in self.results.items()
            if name != OURS and result.timed and result.paged
        ]
        return min(names, key=lambda name: self.results[name].us, default=None)

    def share(self, name: str) -> float:
        return self.ceiling_us / self.results[name].us

    def ratio(self) -> float:
        """The time of the best peer over ours."""
        peer = self.best_peer()
        return self.results[peer].us / self.results[OURS].us if peer else math.nan


def first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"[:160]


def tolerance(case: Case) -> float:
    return 8e-2 if case.cache_dtype == FLOAT8 else 1e-2


def num_copies(case: Case, device: torch.device) -> int:
    return min(32, max(2, math.ceil(COLD_BYTES[device.type] / case.kv_bytes)))


def checked(prepare: Callable[[Batch], Call], batches: Sequence[Batch]) -> tuple[list[Call], float]:
    """The prepared calls of a contender, one for each batch, and its error on the first."""
    calls = [prepare(batch) for batch in batches]
    batches[0].out.fill_(math.nan)
    error = relative_error(batches[0], calls[0]())
    if not error <= tolerance(batches[0].case):
        raise ArithmeticError(f"wrong result: relative error {error:.1e}")
    return calls, error


def attention_contenders(
    peers: Sequence[Peer], batches: Sequence[Batch]
) -> tuple[dict[str, list[Call]], dict[str, Result]]:
    """The calls of all contenders that run and are right, and a row for each contender."""
    calls: dict[str, list[Call]] = {}
    results: dict[str, Result] = {}
    for peer in [Peer(OURS, ours), *peers]:
        results[peer.name] = row = Result(paged=peer.paged)
        try:
            calls[peer.name], row.error = checked(peer.prepare, batches)
        except Exception as error:  # whatever a peer raises, the others are measured
            row.failure = first_line(error)
    return calls, results


def write_contenders(batches: Sequence[Rows]) -> tuple[dict[str, list[Call]], dict[str, Result]]:
    calls: dict[str, list[Call]] = {}
    results: dict[str, Result] = {}
    for name, prepare in WRITERS.items():
        results[name] = row = Result()
        try:
            prepared = [prepare(rows) for rows in batches]
            row.error = written_error(batches[0], prepared[0])
            if row.error:
                raise ArithmeticError(f"wrong result: a share of {row.error:.1e}")
            calls[name] = prepared
        except Exception as error:  # whatever a peer raises, the others are measured
            row.failure = first_line(error)
    return calls, results


def read_ceilings(batches: Sequence[Batch]) -> dict[str, list[Call]]:
    ceilings: dict[str, list[Call]] = {}
    for batch in batches:
        for name, call in reads(batch.kv_cache, batch.case.kv_bytes).items():
            ceilings.setdefault(name, []).append(call)
    return ceilings


def copy_ceilings(batches: Sequence[Rows]) -> dict[str, list[Call]]:
    """A copy of as many bytes as the write moves, read and written."""
    pairs = [
        (torch.stack([rows.key, rows.value]), torch.empty_like(rows.key).repeat(2, 1, 1))
        for rows in batches
    ]
    flat = [(source, target.view_as(source)) for source, target in pairs]
    return {"copy": [lambda s=s, t=t: t.copy_(s) for s, t in flat]}


def timed_us(
    contenders: Mapping[str, list[Call]], device: torch.device, num_bytes: int, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of one call of each contender; and what failed while it was captured."""
    runs: dict[str, Call] = {}
    failures: dict[str, str] = {}
    length = {}
    for name, calls in contenders.items():
        try:
            if device.type == "cuda":
                passes = max(1, round(REPLAY_BYTES / num_bytes / len(calls)))
                runs[name], length[name] = cuda_graph(calls * passes), passes * len(calls)
            else:
                runs[name], length[name] = in_turn(calls), 1
        except Exception as error:  # a peer that cannot be captured
            failures[name] = first_line(error)
    times = interleaved(runs, device, rounds)
    return {name: 1e3 * median_ms(each) / length[name] for name, each in times.items()}, failures


def measure(case: Case, device: torch.device, rounds: int, flex: bool) -> Table:
    torch.manual_seed(0)
    copies = range(num_copies(case, device))
    if case.write:
        rows = [make_rows(case, device) for _ in copies]
        (calls, results), ceilings = write_contenders(rows), copy_ceilings(rows)
    else:
        batches = [make_batch(case, device) for _ in copies]
        calls, results = attention_contenders(all_peers(case, device, flex), batches)
        ceilings = read_ceilings(batches)
    us, failures = timed_us({**ceilings, **calls}, device, case.kv_bytes, rounds)
    for name, failure in failures.items():
        results.setdefault(name, Result()).failure = failure
    ceiling = min((name for name in ceilings if name in us), key=us.__getitem__)
    for name in calls:
        results[name].us = us.get(name, math.nan)
    num_bytes = case.kv_bytes * (2 if case.write else 1)
    return Table(case, num_bytes, ceiling, us[ceiling], results)


def host_costs(device: torch.device) -> dict[str, float]:
    """Microseconds of the host for one eager call of each attention operator, on a small batch."""
    batch = make_batch(Case("host", (64,) * 4), device)
    arguments = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens)
    operators, out = torch.ops.paged, batch.out
    calls: dict[str, Call] = {
        "attention_out": lambda: operators.attention_out(*arguments, out=out),
        "attention_out.default": lambda: operators.attention_out.default(*arguments, out=out),
        "attention.default": lambda: operators.attention.default(*arguments),
    }
    return {name: 1e6 * host_seconds(call, device) for name, call in calls.items()}


def print_case(table: Table) -> None:
    unit = f"{table.num_bytes / 1e6:.0f} MB, {table.case.flops / 1e9:.0f} GFLOP"
    print(f"\n{table.case.name} ({unit})")
    print(f"  {table.ceiling:34} {table.ceiling_us:10.1f} us  {rate(table, table.ceiling_us)}")
    for name, row in table.results.items():
        if not row.timed:
            print(f"  {name:34} {row.failure}")
            continue
        share = f"share {table.share(name):.3f}"
        flops = "" if table.case.decode else f"  {table.case.flops / row.us / 1e6:.0f} TFLOP/s"
        text = f"{row.us:10.1f} us  {rate(table, row.us)}  {share}  error {row.error:.1e}{flops}"
        print(f"  {name:34} {text}", flush=True)


def rate(table: Table, us: float) -> str:
    return f"{table.num_bytes / us / 1e6:6.3f} TB/s"


def print_summary(tables: Sequence[Table]) -> None:
    head = f"{'case':22} {'ceiling':>9} {OURS:>10} {'TB/s':>6} {'TFLOP/s':>8} {'share':>6}"
    print(f"\n{head} {'ratio':>6}  best peer")
    for table in tables:
        row, peer = table.results[OURS], table.best_peer()
        name = f"{table.case.name:22} {table.ceiling_us:9.1f}"
        if not row.timed:
            print(f"{name} {row.failure}")
            continue
        tera = table.num_bytes / row.us / 1e6, table.case.flops / row.us / 1e6
        best = f"{peer}, {table.results[peer].us:.1f} us" if peer else "none"
        figures = f"{row.us:10.1f} {tera[0]:6.3f} {tera[1]:8.1f} {table.share(OURS):6.3f}"
        print(f"{name} {figures} {table.ratio():6.2f}  {best}")


def machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}


def write_json(
    path: Path, tables: Sequence[Table], host: Mapping[str, float], about: object
) -> None:
    rows = [
        {
            **asdict(table),
            "share": table.share(OURS),
            "best_peer": table.best_peer(),
            "ratio": table.ratio(),
            "flops": table.case.flops,
        }
        for table in tables
    ]
    record = {"machine": about, "cases": rows, "host_us": host}
    path.write_text(json.dumps(record, default=str, indent=2))


def write_png(path: Path, tables: Sequence[Table], title: str) -> None:
    """Bars of the share of the ceiling, a group for each case."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    shown = [table for table in tables if table.results[OURS].timed]
    names = [name for name in ordered_names(shown) if any(timed(t, name) for t in shown)]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.16 * len(shown) * (len(names) + 1)))
    height = 1 / (len(names) + 1)
    for index, name in enumerate(names):
        at = [i + index * height for i, table in enumerate(shown) if timed(table, name)]
        shares = [table.share(name) for table in shown if timed(table, name)]
        axes.barh(at, shares, height, label=name, color="black" if name == OURS else None)
    axes.set_yticks([i + 0.4 for i in range(len(shown))], [table.case.name for table in shown])
    axes.invert_yaxis()
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xlabel("time of a plain read of the same bytes, as a share of the time taken")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def ordered_names(tables: Sequence[Table]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table.results))


def timed(table: Table, name: str) -> bool:
    return name in table.results and table.results[name].timed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="names; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flex", action="store_true", help="FlexAttention too: it compiles long")
    parser.add_argument(
        "--vllm-libs", type=Path, help="a folder with the libraries of a vllm wheel"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--png", type=Path, help="draw the shares of the ceiling here")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    cases = {case.name: case for case in (cuda_cases if device.type == "cuda" else cpu_cases)()}
    load_vllm(arguments.vllm_libs)
    tables = []
    for name in arguments.cases or cases:
        tables.append(measure(cases[name], device, arguments.rounds, arguments.flex))
        print_case(tables[-1])
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    host = host_costs(device)
    print_summary(tables)
    print("\nhost, us a call: " + ", ".join(f"{name} {us:.2f}" for name, us in host.items()))
    about = machine(device)
    if arguments.json:
        write_json(arguments.json, tables, host, about)
    if arguments.png:
        write_png(arguments.png, tables, f"{about['device']}, PyTorch {about['torch']}")


if __name__ == "__main__":
    main()
