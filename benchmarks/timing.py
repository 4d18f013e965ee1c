"""How everything here is timed: contenders take turns, so that a busy machine hits all alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def interleaved(
    contenders: Mapping[str, Call], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            taken = seconds_of(call, device)
            if turn > 0:
                seconds[name].append(taken)
    return seconds


def seconds_of(call: Call, device: torch.device) -> float:
    """How long one call takes, by the GPU's own clock where there is one.

    On a CPU another call comes first: the threads that share the work are awake then.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_turn(calls: Sequence[Call], first: int) -> Call:
    """A call that is each of these in turn, from the `first` on.

    Contenders that begin at different calls do not find in a cache what the one before has read.
    """
    turns = itertools.islice(itertools.cycle(calls), first % len(calls), None)
    return lambda: next(turns)()


def cuda_graph(calls: Sequence[Call]) -> Call:
    """One replay of all the calls, one after another, with nothing left to do for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, allocates and plans outside of the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def host_seconds(call: Call, device: torch.device, calls: int = 2000) -> float:
    """What one eager call costs the host, which enqueues it and does not wait."""
    burst = 200  # few enough that the queue of the GPU is never full
    taken = []
    for _ in range(calls // burst + 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(burst):
            call()
        taken.append((time.perf_counter() - started) / burst)
    synchronize(device)
    return statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
