"""What was measured, and how it is shown: as text, JSON and a chart."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cases import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "paged_ops"


@dataclass
class Result:
    """One contender: its time, or why it has none."""

    us: float = math.nan
    error: float = math.nan
    failure: str = ""
    compared: bool = True

    @property
    def timed(self) -> bool:
        """Whether it ran."""
        return not math.isnan(self.us)


@dataclass
class Table:
    """All that was measured of one case."""

    case: Case
    num_bytes: int
    ceiling: str
    ceiling_us: float
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def best_peer(self) -> str | None:
        """The fastest other kernel that reads a cache of blocks."""
        peers = {
            name: result.us
            for name, result in self.results.items()
            if name != OURS and result.timed and result.compared
        }
        return min(peers, key=peers.__getitem__, default=None)

    @property
    def ratio(self) -> float:
        """The time of the best peer over ours."""
        peer = self.best_peer
        return self.results[peer].us / self.results[OURS].us if peer else math.nan

    def share(self, name: str) -> float:
        """The time of the ceiling over that of a contender."""
        return self.ceiling_us / self.results[name].us

    def has_time(self, name: str) -> bool:
        """Whether a contender took part and ran."""
        return name in self.results and self.results[name].timed


def rate(table: Table, us: float) -> str:
    tera = table.num_bytes / us / 1e6
    return f"{tera:6.3f} TB/s" if tera >= 0.1 else f"{1e3 * tera:6.2f} GB/s"


def flop_rate(table: Table, us: float) -> str:
    """Of work that is bound by it."""
    return f"{table.case.flops / us / 1e6:6.1f} TFLOP/s" if table.case.prefill else ""


def print_case(table: Table) -> None:
    """All contenders of one case."""
    print(
        f"\n{table.case.name}: {table.num_bytes / 1e6:.0f} MB, {table.case.flops / 1e9:.1f} GFLOP"
    )
    print(f"  {table.ceiling:30} {table.ceiling_us:10.1f} us {rate(table, table.ceiling_us)}")
    for name, row in table.results.items():
        if row.timed:
            figures = f"{row.us:10.1f} us {rate(table, row.us)}  share {table.share(name):5.3f}"
            text = f"{figures}  error {row.error:.1e}  {flop_rate(table, row.us)}"
        else:
            text = row.failure
        print(f"  {name:30} {text}", flush=True)


def print_summary(tables: Sequence[Table]) -> None:
    """One line for each case."""
    print(f"\n{'case':22} {'ceiling us':>11} {'ours us':>10} {'share':>6} {'ratio':>6}  best peer")
    for table in tables:
        row, peer = table.results[OURS], table.best_peer
        case = f"{table.case.name:22} {table.ceiling_us:11.1f}"
        if not row.timed:
            print(f"{case} {row.failure}")
            continue
        best = f"{peer}, {table.results[peer].us:.1f} us" if peer else "none"
        speed = f"{rate(table, row.us)} {flop_rate(table, row.us)}"
        figures = f"{row.us:10.1f} {table.share(OURS):6.3f} {table.ratio:6.2f}"
        print(f"{case} {figures}  {best:40} {speed}")


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def write_json(
    path: Path, tables: Sequence[Table], host_us: Mapping[str, float], about: Mapping[str, object]
) -> None:
    """All figures."""
    rows = [
        {
            **asdict(table),
            "flops": table.case.flops,
            "share": table.share(OURS),
            "best_peer": table.best_peer,
            "ratio": table.ratio,
        }
        for table in tables
    ]
    record = {"machine": about, "host_us": host_us, "cases": rows}
    path.write_text(json.dumps(record, default=str, indent=2))


def write_png(path: Path, tables: Sequence[Table], about: Mapping[str, object]) -> None:
    """Two charts, a group of bars for each case: shares of the ceiling, and arithmetic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    charts: list[tuple[list[Table], str, Callable[[Table, str], float]]] = [
        (
            [table for table in tables if not table.case.prefill],
            "time of a plain read (or copy) of the same bytes, as a share of the time taken",
            Table.share,
        ),
        (
            [table for table in tables if table.case.prefill],
            "TFLOP/s",
            lambda table, name: table.case.flops / table.results[name].us / 1e6,
        ),
    ]
    charts = [chart for chart in charts if chart[0]]
    names = list(dict.fromkeys(name for table in tables for name in table.results))
    names = [name for name in names if any(table.has_time(name) for table in tables)]
    rows = [len(chart[0]) for chart in charts]
    figure, all_axes = pyplot.subplots(
        len(charts),
        figsize=(9, 1.5 + 0.12 * sum(rows) * (len(names) + 1)),
        squeeze=False,
        height_ratios=rows,
    )
    for axes, (shown, label, value) in zip(all_axes.flat, charts, strict=True):
        draw_bars(axes, shown, names, value)
        axes.set_xlabel(label)
    all_axes[0, 0].set_title(f"{about['device']}, PyTorch {about['torch']}")
    all_axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def draw_bars(
    axes: Axes,
    tables: Sequence[Table],
    names: Sequence[str],
    value: Callable[[Table, str], float],
) -> None:
    """A group of bars for each table, a colour for each contender."""
    height = 1 / (len(names) + 1)
    for index, name in enumerate(names):
        places = [i for i, table in enumerate(tables) if table.has_time(name)]
        values = [value(tables[i], name) for i in places]
        color = "black" if name == OURS else f"C{index - 1}"
        axes.barh([i + index * height for i in places], values, height, label=name, color=color)
    middle = (len(names) - 1) * height / 2
    axes.set_yticks([i + middle for i in range(len(tables))], [t.case.name for t in tables])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.5)
