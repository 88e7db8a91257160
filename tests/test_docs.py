"""The pages in docs/ tell the truth: what they show is executed."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", [page for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text("utf-8")])
def test_the_examples_of_a_page_run(page: Path) -> None:
    outcome = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert outcome.attempted > 0
    assert outcome.failed == 0
