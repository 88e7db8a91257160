"""What several verbs of trace ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RulesFile = Annotated[Path | None, typer.Option("--rules", help="A JSON file that tells what further kernels are.")]
Within = Annotated[
    str | None, typer.Option("--within", metavar="NAME", help="Only what was launched inside this annotation.")
]
