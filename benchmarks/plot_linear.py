"""Plots of what `bench_linear.py --csv` wrote: each provider's time over the frozen base's, shape by shape.

Usage: python benchmarks/plot_linear.py FILE.csv...    writes FILE.png beside each
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure


def shape(row: dict[str, str]) -> str:
    return "{mode} {N}x{L} {D}→{F} E{E} K{K} R{R} {routing}".format(**row)


def plot(path: Path) -> Path:
    """One row of marks per shape; machine, threads, dtype and the form of the shapes stand under them."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shapes = list(dict.fromkeys(map(shape, rows)))
    figure = Figure(figsize=(10, 1.8 + 0.32 * len(shapes)), layout="constrained")
    axes = figure.add_subplot()
    for provider in dict.fromkeys(row["provider"] for row in rows):
        found = {shape(row): float(row["ratio"]) for row in rows if row["provider"] == provider}
        size = 60 if provider == "ours" else 22
        axes.scatter(list(found.values()), [shapes.index(each) for each in found], s=size, label=provider)
    axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    machine = f"{rows[0]['machine']}, {rows[0]['threads']} threads, {rows[0]['dtype']}"
    axes.set_xlabel(f"time over F.linear's, 20th percentiles\n{machine}\nshapes: instances x tokens, D→F", fontsize=9)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=130)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("csv", nargs="+", type=Path)
    for path in parser.parse_args().csv:
        print(plot(path))


if __name__ == "__main__":
    main()
