"""The kernels of a decode step as a table: what attention takes, and what lies between kernels."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

import torch
from decoders import CHUNK, Contender

# Parts of the names of kernels that attend.
ATTENTION = ("decode_kernel", "portable_kernel", "fmha", "flash", "sdpa", "softmax")
ROWS = 20  # of the table; the rest is summed up


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or of a copy; us."""

    start: float
    end: float
    name: str


@dataclass
class Profile:
    """Of some steps, one after another; us.

    Attributes:
        kernels: in the order of their start.
        steps: how many these were.
        gaps: from each kernel's end to the next one's start, where nothing ran.
    """

    kernels: list[Kernel]
    steps: int
    gaps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        last = self.kernels[0].end
        for kernel in self.kernels[1:]:
            self.gaps.append(max(kernel.start - last, 0.0))
            last = max(last, kernel.end)
        self.span = last - self.kernels[0].start

    def share(self, parts: tuple[str, ...]) -> float:
        """Of the kernels whose names have one of these parts, in the time of all."""
        times = [(each.end - each.start, each.name.lower()) for each in self.kernels]
        found = sum(us for us, name in times if any(part in name for part in parts))
        return found / sum(us for us, _ in times)

    def __str__(self) -> str:
        calls: Counter[str] = Counter()
        us: Counter[str] = Counter()
        for kernel in self.kernels:
            calls[kernel.name] += 1
            us[kernel.name] += kernel.end - kernel.start
        total, steps = sum(us.values()), self.steps
        lines = [
            f"{self.span / steps:.0f} us a step, {len(self.kernels) / steps:.0f} kernels; "
            f"attention {self.share(ATTENTION):.1%}, write_kv {self.share(('write_kv',)):.1%}",
            f"nothing runs for {sum(self.gaps) / self.span:.1%} of the time; a gap between kernels "
            f"is {statistics.median(self.gaps):.2f} us in the median, {max(self.gaps):.1f} at most",
            f"{'calls':>7} {'us a call':>10} {'us a step':>10} {'share':>6}  kernel",
        ]
        for name, each in us.most_common(ROWS):
            figures = f"{calls[name] / steps:7.1f} {each / calls[name]:10.2f} {each / steps:10.1f}"
            lines.append(f"{figures} {each / total:6.1%}  {name[:100]}")
        rest = total - sum(each for _, each in us.most_common(ROWS))
        others = max(len(us) - ROWS, 0)
        lines.append(f"{'':18} {rest / steps:10.1f} {rest / total:6.1%}  {others} others")
        return "\n".join(lines)


def profile(contender: Contender, device: torch.device) -> Profile | None:
    """Of one chunk of steps at the case's lengths; None if the profiler sees no kernels."""
    contender.restart()
    contender.launch(CHUNK)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        contender.launch(CHUNK)
        torch.cuda.synchronize(device)
    kernels = [
        Kernel(event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    kernels.sort(key=lambda kernel: kernel.start)
    return Profile(kernels, CHUNK) if kernels else None
