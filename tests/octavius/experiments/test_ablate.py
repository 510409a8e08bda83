"""The runner of tables: resumable, and two processes never do the same run."""

import json
import multiprocessing
import os
import time

import pytest

from octavius.experiments.ablate import Run, append_result, read_results, run_table


def run(number):
    return Run("test", "tiny", "main", f"arm{number}", "1:4", number, 1e-3)


class Counting:
    """Runs that note, in a file, which process did which."""

    def __init__(self, journal, number=6, wait=0.05):
        self.journal, self.number, self.wait = journal, number, wait

    def runs(self, finished):
        keys = {line["key"] for line in finished}
        return [run(index) for index in range(self.number) if run(index).key not in keys]

    def execute(self, run):
        with open(self.journal, "a") as file:
            file.write(f"{os.getpid()} {run.key}\n")
        time.sleep(self.wait)
        return {"score": run.seed / 10}


def work(folder, wait=0.05):
    run_table(Counting(folder / "journal", wait=wait), folder / "results.jsonl", folder / "locks", say=lambda _: None)


def test_two_processes_share_the_runs(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(tmp_path, 0.3)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    journal = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
    assert sorted(key for _, key in journal) == sorted(run(index).key for index in range(6))
    assert sorted(line["key"] for line in read_results(tmp_path / "results.jsonl")) == sorted(key for _, key in journal)


def test_killed_run_is_done_again_and_finished_ones_are_not(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work, args=(tmp_path, 1.0))
    process.start()
    deadline = time.time() + 60
    while len(read_results(tmp_path / "results.jsonl")) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    before = read_results(tmp_path / "results.jsonl")
    assert 2 <= len(before) < 6
    work(tmp_path)
    after = read_results(tmp_path / "results.jsonl")
    assert after[: len(before)] == before and len({line["key"] for line in after}) == len(after) == 6
    assert after[3]["score"] == pytest.approx(after[3]["seed"] / 10) and after[3]["arm"] == "arm3"


def test_torn_last_line_is_replaced_and_another_is_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    append_result(file, {"key": "a"})
    with open(file, "a") as handle:
        handle.write('{"key": "b')
    assert read_results(file) == [{"key": "a"}]
    append_result(file, {"key": "c"})
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "c"]
    file.write_text('{"key": "a\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="line 1 must be JSON"):
        read_results(file)


def test_no_run_starts_after_the_deadline(tmp_path):
    done = run_table(Counting(tmp_path / "journal"), tmp_path / "r.jsonl", tmp_path / "locks", time.time() - 1)
    assert done == 0 and not (tmp_path / "r.jsonl").exists()
