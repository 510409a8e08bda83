"""Several ranks choose alike, whatever their files say, and none waits for another inside a call."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_two_ranks_with_contradictory_files_choose_alike(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("MOE_LORA_BACKEND", None)
    command = [sys.executable, "-m", "tests.support.ranks"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment, cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    first, second = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert second.pop("met alone") == "first"  # by rule, since the ranks had not agreed
    assert first == second
    assert first["before the first share"] == "first" and first["known to all"] == "second"
    assert first["after the next share"] == "third"  # the times of the rank that had met it
