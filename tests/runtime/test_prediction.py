"""The simulator's prediction, held against processes that sleep as long as the costs say."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "sleeping_stages.py"


@pytest.mark.slow
def test_every_schedule_takes_within_five_per_cent_of_what_was_predicted() -> None:
    done = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
