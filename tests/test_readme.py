"""README and docs tell the truth: their examples run, their tables and pictures are what the commands make now."""

import doctest
import re
from pathlib import Path

import pytest

from counterflow import Costs, dualpipe, simulate
from counterflow.cli import main
from counterflow.report import schedule_svg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_in_the_readme_run() -> None:
    outcome = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert outcome.attempted > 10
    assert outcome.failed == 0


def test_a_command_in_the_readme_prints_what_stands_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"```\ncounterflow (.+)\n```\n```\n(.+?)```", README, flags=re.DOTALL)
    assert shown
    for command, printed in shown:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == printed


def test_the_picture_in_the_readme_is_what_draw_makes() -> None:
    schedule = dualpipe(8, 20)
    picture = (ROOT / "docs" / "dualpipe.svg").read_text(encoding="utf-8")
    assert picture == schedule_svg(schedule, simulate(schedule, Costs())), (
        "draw it again: counterflow draw dualpipe --ranks 8 --microbatches 20 -o docs/dualpipe.svg"
    )


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
