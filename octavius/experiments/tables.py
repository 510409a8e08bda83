"""Tables by name: the interference benchmark and the tables of the Octavius work."""

import time
from pathlib import Path

from octavius.assets import registry
from octavius.experiments.ablate import read_results, run_table
from octavius.experiments.interference import Interference
from octavius.experiments.interference_table import write_interference
from octavius.experiments.seed_tables import TABLES, SeedTable, write_table

NAMES = ("interference", *TABLES)


def ablate(name: str, budget: str, folder: Path, resume: bool = False, minutes: float | None = None) -> str:
    """Do the runs of a table that are not finished, and write the table.

    Args:
        name: of the table, one of NAMES.
        budget: `small`, `full`, or for the Octavius work's tables `smoke`.
        folder: receives `interference.jsonl` or `tables.jsonl`, a line for each finished run, and the table.
        resume: go on from the lines that are there; two processes with it share the runs.
        minutes: start no run after so many minutes.

    Returns:
        the table as text.

    Raises:
        ValueError: no such table or budget, or there are finished runs and not resume.
    """
    if name not in NAMES:
        raise ValueError(f"table must be one of {', '.join(NAMES)}, got {name!r}")
    scratch = registry.default_cache() / "ablate"
    interference = name == "interference"
    table = Interference(budget, scratch / "runs") if interference else SeedTable(name, budget, scratch / "runs")
    results = folder / ("interference.jsonl" if interference else "tables.jsonl")
    if not resume and any(line["budget"] == budget for line in read_results(results)):
        raise ValueError(
            f"{results} holds finished runs of budget {budget}: give --resume to go on, or another --folder"
        )
    run_table(table, results, scratch / "locks", None if minutes is None else time.time() + 60 * minutes)
    if interference:
        return write_interference(results, folder / "interference.md", budget)
    cells = write_table(name, results, folder, budget)
    return "\n".join(f"{c['row']}: {c['value']}: {c['ours']} ({c['seeds']}); paper {c['paper'] or '-'}" for c in cells)
