"""README and docs tell the truth: their examples run, their tables and pictures are what the commands make now."""

import doctest
import re
from pathlib import Path

import pytest

from counterflow import Costs, Schedule, dualpipe, dualpipev, simulate
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


@pytest.mark.parametrize("schedule", [dualpipe(8, 20), dualpipev(4, 10)], ids=lambda schedule: schedule.name)
def test_the_pictures_in_docs_are_what_draw_makes(schedule: Schedule) -> None:
    picture = (ROOT / "docs" / f"{schedule.name}.svg").read_text(encoding="utf-8")
    assert picture == schedule_svg(schedule, simulate(schedule, Costs())), (
        f"draw it again: counterflow draw {schedule.name} --ranks {schedule.num_ranks} "
        f"--microbatches {schedule.num_microbatches} -o docs/{schedule.name}.svg"
    )


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
