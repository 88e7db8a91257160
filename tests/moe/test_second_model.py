"""The example with another model does what it says."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "second_model.py"


def test_the_second_model_has_the_gradients_of_plain_autograd_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "gradients equal those of plain autograd: True" in printed
    before, after = map(float, re.findall(r"\d+\.\d+", printed))
    assert after < before / 2
