"""How fast is a decode step, beside the time in which the machine reads what the step must read?

    python benchmarks/generate.py --model random:llama-3-8b --cases 1x1k 64x4kr 256x1k
    python benchmarks/generate.py --dtype float32 --cases 4x64 --contenders paged eager dense

A case is sequences x tokens of each; with an r it is ragged: lengths from a sixteenth of these
tokens to all of them. The *roofline* of a case is its weights (without the rows of the embedding
that no token names) and its keys and values, at the speed of the fastest plain read that was
measured in the same run; a *share* is the roofline's time over that of a step.

Contenders: *paged* is the loop of examples/generate.py; *index_put* the same with PyTorch's
index_put_ in place of write_kv, which with several rows Inductor fuses with the rotation of the
keys; *eager* the same without the compiler; *dense* has the same weights, and SDPA over a padded
cache; *transformers* is the hub's model with its static cache, compiled.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from reads import reads
from report import machine
from timing import interleaved, synchronize

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from decode_loop import INDUCTOR_OPTIONS
from decoder import Decoder
from decoders import CHUNK, CONTENDERS, Case, Contender, Setup, forget
from generation_chart import write_png
from kernel_profile import profile
from options import DEFAULT_DEVICE, DTYPES, Parser, UsageError, checked, integer, usable_device
from random_models import MODELS, load_model
from torch._dynamo.utils import counters

BATCHES, CONTEXTS = (1, 8, 64, 256), (1024, 8192, 32768)
SPARE_BYTES = 4e9  # for what a step needs beside weights and cache, and for the compiler's trials


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        ms: of a step.
        share: of the roofline.
        own_gb: caches, and weights that only this contender has.
        other_gb: the peak of the memory that was reserved beyond the model's weights and own_gb,
            captured graphs included; 0 on a CPU.
        prepare_seconds: until the first steps had run.
        compiled, captured: graphs, to prepare. Inductor's captures are not counted.
        recompiled: graphs, while the lengths grew.
        skipped: CUDA graphs that Inductor did not capture.
    """

    case: str
    contender: str
    ms: float
    tokens_per_second: float
    share: float
    own_gb: float
    other_gb: float
    prepare_seconds: float
    compiled: int
    captured: int
    recompiled: int
    skipped: int


@dataclass
class Record:
    """All that was measured, written anew after each row: what ends a run costs no row."""

    machine: dict[str, object]
    read_bandwidth: float
    arguments: dict[str, object]
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def write(self, json_path: Path | None, png_path: Path | None) -> None:
        """Where these were asked for."""
        text = json.dumps(asdict(self), default=str, indent=2)
        if json_path:
            json_path.write_text(text)
        if png_path and self.rows:
            write_png(json.loads(text), png_path)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest of many plain reads."""
    num_bytes = 1 << (32 if device.type == "cuda" else 28)
    memory = torch.zeros(num_bytes // 8, dtype=torch.int64, device=device)
    times = interleaved(reads(memory, num_bytes), device, 5)
    return num_bytes / min(min(seconds) for seconds in times.values())


def weight_bytes(model: Decoder) -> int:
    """What a step reads of the weights: all but an embedding that is not the head too."""
    total = sum(each.nbytes for each in model.parameters())
    return total if model.config.tied_embeddings else total - model.embedding.weight.nbytes


def token_bytes(model: Decoder) -> int:
    """Keys and values of one token in all layers."""
    config = model.config
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_size
    return elements * model.embedding.weight.element_size()


def split_by_room(
    cases: Sequence[Case], model: Decoder, steps: int
) -> tuple[list[Case], list[str]]:
    """The cases whose cache fits beside the weights, and a sentence on each of the others."""
    device = model.embedding.weight.device
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else float("inf")
    fitting, skipped = [], []
    for case in cases:
        needed = sum(n + steps for n in case.seq_lens) * token_bytes(model) + SPARE_BYTES
        if needed <= free:
            fitting.append(case)
        else:
            skipped.append(f"{case} needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    return fitting, skipped


def seconds_per_step(contender: Contender, device: torch.device, steps: int, rounds: int) -> float:
    """The fastest of some rounds of steps, launched as a loop does: one chunk after another.

    The first chunk is not timed: the device works on it while the host prepares the next.
    """
    best = float("inf")
    for _ in range(rounds):
        contender.restart()
        contender.launch(CHUNK)
        started = mark(device)
        for _ in range(steps // CHUNK):
            contender.launch(CHUNK)
        ended = mark(device)
        synchronize(device)
        if device.type == "cuda":
            best = min(best, 1e-3 * started.elapsed_time(ended) / steps)
        else:
            best = min(best, (ended - started) / steps)
    return best


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment, by the clock of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(
    name: str, contender: Contender, case: Case, setup: Setup, rounds: int, bandwidth: float
) -> Row:
    """Prepare the case, and time its steps while the lengths grow."""
    device, captures = setup.device, contender.captures
    counters.clear()
    started = time.perf_counter()
    contender.start(case)
    synchronize(device)
    prepare_seconds = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the compiler tried does not count
        torch.cuda.reset_peak_memory_stats()
    compiled = counters["stats"]["unique_graphs"]
    seconds = seconds_per_step(contender, device, setup.steps - CHUNK, rounds)
    model_bytes = sum(each.nbytes for each in setup.model.parameters())
    read = weight_bytes(setup.model) + sum(case.seq_lens) * token_bytes(setup.model)
    return Row(
        case=str(case),
        contender=name,
        ms=1e3 * seconds,
        tokens_per_second=case.batch / seconds,
        share=read / bandwidth / seconds,
        own_gb=contender.own_bytes / 1e9,
        other_gb=max(reserved_bytes(device) - model_bytes - contender.own_bytes, 0) / 1e9,
        prepare_seconds=prepare_seconds,
        compiled=compiled,
        captured=contender.captures - captures,
        recompiled=counters["stats"]["unique_graphs"] - compiled,
        skipped=counters["inductor"]["cudagraph_skips"],
    )


def reserved_bytes(device: torch.device) -> int:
    """The most that was held since the count began; captured graphs hold what they work in."""
    return torch.cuda.max_memory_reserved() if device.type == "cuda" else 0


class Run:
    """Measures each contender in all cases, and goes on when one fails."""

    def __init__(self, setup: Setup, arguments: argparse.Namespace, record: Record) -> None:
        self.setup, self.arguments, self.record = setup, arguments, record
        self.failed = False
        self.until = time.perf_counter() + 60 * arguments.minutes

    def contend(self, name: str) -> None:
        """All cases of one contender, which is made once."""
        contender = self._tried(name, CONTENDERS[name], self.setup)
        for case in self.setup.cases if contender else ():
            if time.perf_counter() > self.until:
                self.record.skipped.append(f"{name} {case}: out of time")
                continue
            row = self._tried(
                f"{name} {case}",
                measure,
                name,
                contender,
                case,
                self.setup,
                self.arguments.rounds,
                self.record.read_bandwidth,
            )
            if row is None:
                continue
            self.record.rows.append(row)
            print_table([row], self.record.rows)
            self._check(row)
            self.record.write(self.arguments.json, None)
            if name in self.arguments.profile:
                print(f"\n{name} {case}: {profile(contender, self.setup.device)}\n", flush=True)

    def _tried(self, what: str, call: Callable[..., Any], *arguments: object) -> Any:
        """What the call returns; None if it fails, which is to cost no other figures."""
        try:
            return call(*arguments)
        except (torch.OutOfMemoryError, ImportError) as error:
            self.record.skipped.append(f"{what}: {str(error).splitlines()[0]}")
        except Exception:
            self.failed = True
            self.record.skipped.append(f"{what} failed")
            traceback.print_exc()
        return None

    def _check(self, row: Row) -> None:
        """The examples' loop compiles nothing while lengths grow, and captures once."""
        graphs = int(self.setup.device.type == "cuda")
        if row.contender == "paged" and (row.recompiled or row.skipped or row.captured > graphs):
            self.failed = True
            print(f"{row.contender} {row.case} has compiled or captured more than once")


def print_table(rows: Sequence[Row], all_rows: Sequence[Row]) -> None:
    """One line for each row, with how much slower than the paged loop it is."""
    ours = {row.case: row.ms for row in all_rows if row.contender == "paged"}
    for row in rows:
        print(
            f"{row.case:10} {row.contender:13} {row.ms:8.3f} {row.tokens_per_second:9.0f} "
            f"{row.share:6.3f} {row.ms / ours.get(row.case, float('nan')):6.2f} "
            f"{row.own_gb:7.2f} {row.other_gb:8.2f} {row.prepare_seconds:9.1f} "
            f"{row.compiled:8} {row.captured:8} {row.recompiled:10} {row.skipped:7}",
            flush=True,
        )


def print_head() -> None:
    print(
        f"\n{'case':10} {'contender':13} {'ms':>8} {'tokens/s':>9} {'share':>6} {'ratio':>6} "
        f"{'own GB':>7} {'other GB':>8} {'prepare s':>9} compiled captured recompiled skipped",
        flush=True,
    )


def inductor_option(text: str) -> tuple[str, bool | int]:
    """As torch.compile takes it."""
    name, value = text.split("=")
    try:
        return name, ast.literal_eval(value)
    except SyntaxError as error:
        raise ValueError(text) from error


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"{MODELS}; default: SmolLM2-135M-Instruct")
    parser.add_argument("--device", type=usable_device, default=DEFAULT_DEVICE)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    case = checked(
        Case.parse,
        "sequences x tokens, both at least 1, as 64x4k or 8x1kr",
        lambda case: min(case.batch, case.context) > 0,
    )
    parser.add_argument("--cases", type=case, nargs="+", metavar="CASE")
    count = integer(1)
    parser.add_argument("--batches", type=count, nargs="+", default=BATCHES, help="without --cases")
    parser.add_argument("--contexts", type=count, nargs="+", default=CONTEXTS, help="likewise")
    parser.add_argument("--ragged", action="store_true", help="likewise: ragged cases too")
    parser.add_argument(
        "--contenders", choices=CONTENDERS, nargs="+", default=["paged", "dense", "transformers"]
    )
    parser.add_argument(
        "--inductor",
        type=checked(inductor_option, "NAME=VALUE", lambda _: True),
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further options of torch.compile on a GPU, as coordinate_descent_tuning=True; with "
        "max_autotune=True also triton.enable_pdl=False, since not all of its products wait",
    )
    parser.add_argument("--steps", type=count, default=64, help="that are timed together")
    parser.add_argument("--rounds", type=count, default=3, help="of which the fastest counts")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no case begins")
    parser.add_argument(
        "--profile",
        choices=CONTENDERS,
        nargs="*",
        default=[],
        help="print the kernels of a step of these contenders, on a GPU",
    )
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--png", type=Path, help="write a chart here")
    return parser


def measure_all(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if arguments.cases is None:
        kinds = (False, True) if arguments.ragged else (False,)
        grid = itertools.product(arguments.batches, arguments.contexts, kinds)
        arguments.cases = list(itertools.starmap(Case, grid))
    if arguments.profile and device.type != "cuda":
        raise UsageError("--profile needs a GPU")
    bandwidth = read_bandwidth(device)
    print(f"the fastest read: {bandwidth / 1e12:.3f} TB/s", flush=True)
    forget(device)
    model = load_model(arguments.model, DTYPES[arguments.dtype], device).model
    steps = -(-arguments.steps // CHUNK) * CHUNK + CHUNK
    # Few sequences first: memory is counted up to its peak.
    cases = sorted(arguments.cases, key=lambda case: (case.batch, case.context))
    cases, skipped = split_by_room(cases, model, steps)
    record = Record(machine(device), bandwidth, vars(arguments), skipped=skipped)
    options = {**INDUCTOR_OPTIONS, **dict(arguments.inductor)}
    run = Run(Setup(model, cases, steps, options), arguments, record)
    print_head()
    with torch.no_grad():
        for name in arguments.contenders if cases else ():
            run.contend(name)
            forget(device)
    print_head()
    print_table(
        sorted(record.rows, key=lambda row: list(map(str, cases)).index(row.case)), record.rows
    )
    print("".join(f"\nskipped: {each}" for each in record.skipped))
    record.write(arguments.json, arguments.png)
    sys.exit(int(run.failed))


if __name__ == "__main__":
    make_parser().run(measure_all, None)
