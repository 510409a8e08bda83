"""CPU time of commands that load no model: `octavius --help` and the like, in processes of their own.

    python benchmarks/bench_cli.py [--rounds 9]

CPU time, user and system, of a whole process with its imports; rounds are interleaved, p20 and median over them.
"""

import argparse
import os
import statistics
import subprocess
import sys

COMMANDS = (
    ("--help",),
    ("--version",),
    ("train", "--help"),
    ("chat", "What is it?", "--image", "/no/such/image.png"),
)


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """CPU seconds of one run of the command."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "octavius", *arguments], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times = {arguments: [] for arguments in COMMANDS}
    for _ in range(rounds):
        for arguments in COMMANDS:
            times[arguments].append(cpu_seconds(arguments))
    print(f"{'CPU seconds of octavius':<54}{'p20':>6}{'median':>8}")
    for arguments, seconds in times.items():
        p20 = sorted(seconds)[len(seconds) // 5]
        print(f"{' '.join(arguments):<54}{p20:>6.2f}{statistics.median(seconds):>8.2f}")


if __name__ == "__main__":
    main()
