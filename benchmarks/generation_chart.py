"""A chart of what benchmarks/generate.py has measured.

python benchmarks/generation_chart.py generate.json generate.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LABELS = {
    "paged": "paged_ops",
    "index_put": "paged_ops, keys and values by index_put_",
    "eager": "paged_ops, not compiled",
    "dense": "the same model, SDPA, dense cache",
    "transformers": "transformers, static cache, compiled",
}


def write_png(record: Mapping[str, Any], path: Path) -> None:
    """The share of the roofline that each contender reaches in each case, and its tokens/s."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = {(row["case"], row["contender"]): row for row in record["rows"]}
    cases = list(dict.fromkeys(case for case, _ in rows))
    names = [name for name in LABELS if any(name == other for _, other in rows)]
    height = 1 / (len(names) + 1)
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.25 * len(cases) * (len(names) + 1)))
    for index, name in enumerate(names):
        here = [i for i, case in enumerate(cases) if (case, name) in rows]
        shares = [rows[cases[i], name]["share"] for i in here]
        color = "black" if name == "paged" else f"C{index - 1}"
        places = [i + index * height for i in here]
        axes.barh(places, shares, height, label=LABELS[name], color=color)
        for i, place, share in zip(here, places, shares, strict=True):
            tokens = f" {rows[cases[i], name]['tokens_per_second']:.0f} tokens/s"
            axes.text(share, place, tokens, va="center", fontsize=7)
    middle = (len(names) - 1) * height / 2
    axes.set_yticks([i + middle for i in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.grid(axis="x", linewidth=0.5)
    axes.set_xlabel("share of the roofline: time to read weights, keys and values, over the step's")
    axes.set_ylabel("sequences x tokens of each (r: ragged)")
    machine, model = record["machine"], record["arguments"]["model"] or "SmolLM2-135M"
    axes.set_title(f"{model}: {machine['device']}, PyTorch {machine['torch']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    write_png(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
