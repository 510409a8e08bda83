"""The Octavius work's tables: every row is a valid run, shared rows run once, the CSV keeps ours and theirs apart."""

import csv

import pytest
from typer.testing import CliRunner

from octavius.cli import app
from octavius.config import load_config
from octavius.experiments.ablate import append_result
from octavius.experiments.seed_tables import TABLES, SeedTable, slug, write_table
from octavius.experiments.tables import NAMES, ablate

ROWS = [row for rows in TABLES.values() for row in rows if row.preset]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_the_run_that_its_name_says(row):
    config = load_config(row.preset, list(row.settings)).model
    single = "one LoRA" in row.name
    assert (config.lora.num_experts == 1) == single
    for number in (8, 16):
        assert (config.lora.rank == number) == (f"rank {number}" in row.name)
    assert (config.gate.mode == "dense") == (row.name == "dense") and (config.gate.mode == "token") == (
        "token" in row.name
    )
    assert (config.gate.load_balancing > 0) == ("load balancing" in row.name)
    assert (config.gate.kind == "tasks") == (row.name.startswith("our gate"))
    assert config.system == ("system" in row.name)


def test_tables_share_rows_and_skip_what_is_finished(tmp_path):
    gates, rank = (SeedTable(name, "full", tmp_path).runs([]) for name in ("gates", "rank"))
    assert len(gates) == 5 * 3 and len(rank) == 3 * 3
    shared = {run.key for run in gates} & {run.key for run in rank}
    assert len(shared) == 3  # top-2 of rank 32, three seeds
    left = SeedTable("rank", "full", tmp_path).runs([{"key": run.key} for run in gates])
    assert len(left) == 6 and not {run.key for run in left} & shared
    assert len({run.arm for run in SeedTable("systems", "small", tmp_path).runs([])}) == 3  # 3D-LLM is cited


def test_csv_keeps_ours_and_the_papers_apart_and_names_what_is_missing(tmp_path):
    row = TABLES["rank"][1]
    results = tmp_path / "tables.jsonl"
    for seed, recall in ((0, 0.2), (1, 0.3)):
        fields = {
            "key": str(seed),
            "table": "seeds",
            "budget": "full",
            "arm": slug(row),
            "mix": row.preset,
            "seed": seed,
        }
        append_result(results, fields | {"scores": {"detection": {"recall@0.5": recall}, "vqa": {"Acc@1": 0.5}}})
    write_table("rank", results, tmp_path, "full")
    with open(tmp_path / "rank.csv", encoding="utf-8") as file:
        cells = {(cell["row"], cell["value"]): cell for cell in csv.DictReader(file)}
    cell = cells["top-2, rank 16", "detection recall"]
    assert (cell["ours"], cell["seeds"], cell["paper"]) == ("25.00", "2 of 3", "32.81")
    cell = cells["top-2, rank 8", "VQA accuracy"]
    assert (cell["ours"], cell["seeds"], cell["paper"]) == ("missing", "0 of 3", "37.65")
    assert (tmp_path / "rank.png").stat().st_size > 5000
    write_table("systems", results, tmp_path, "full")
    assert "3D-LLM (Flamingo),3D VQA CIDEr,,0 of 0,59.2," in (tmp_path / "systems.csv").read_text()
    write_table("token", results, tmp_path, "full")
    assert "token gate,detection recall,missing,0,,the paper: fail" in (tmp_path / "token.csv").read_text()


def test_unknown_names_and_finished_runs_without_resume_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table must be one of interference, gates, .*got 'gate'"):
        ablate("gate", "small", tmp_path)
    with pytest.raises(ValueError, match="budget must be one of smoke, small, full, got 'tiny'"):
        ablate("gates", "tiny", tmp_path)
    append_result(tmp_path / "tables.jsonl", {"key": "a", "budget": "small", "table": "seeds"})
    with pytest.raises(ValueError, match="holds finished runs of budget small: give --resume"):
        ablate("gates", "small", tmp_path)


def test_command_writes_every_table_without_a_run_when_no_time_is_left(tmp_path):
    for name in NAMES:
        arguments = ["ablate", "--table", name, "--budget", "small", "--folder", str(tmp_path), "--minutes", "0"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert "missing" in done.output
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png", ".md"}


@pytest.mark.slow
def test_row_of_a_table_is_trained_scored_and_written(tmp_path, monkeypatch):
    table = SeedTable("rank", "smoke", tmp_path / "runs")
    run = table.runs([])[2]
    line = {"key": run.key, **vars(run), **table.execute(run)}
    append_result(tmp_path / "tables.jsonl", line)
    cells = write_table("rank", tmp_path / "tables.jsonl", tmp_path, "smoke")
    ours = {(cell["row"], cell["value"]): cell["ours"] for cell in cells}
    assert line["steps"] == 8 and ours["top-2, rank 16", "detection recall"] == "missing"
    assert 0 <= float(ours["top-2, rank 8", "VQA accuracy"]) <= 100
    assert not list((tmp_path / "runs").iterdir())
