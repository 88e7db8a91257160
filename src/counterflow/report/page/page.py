"""The page: its template, style and script are beside this file, and the data of the traces stands in it as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

from counterflow.report.page.data import Data, data_of
from counterflow.trace import Rules, Trace

if TYPE_CHECKING:
    from jinja2 import Template

_SCRIPTS = (
    *("data.js", "view.js", "labels.js", "draw.js", "map.js", "search.js"),
    *("facts.js", "summary.js", "tables.js", "sheet.js", "act.js"),
)
"""In the order in which they build on each other; the page holds them as one script."""


class Page(NamedTuple):
    """A page, and how much is drawn on it; the GPUs of a timeline are its ranks."""

    html: str
    num_gpus: int
    num_slices: int
    num_left_out: int
    is_timeline: bool


def trace_page(traces: Sequence[Trace], rules: Rules | None = None, within: str | None = None) -> Page:
    """Lanes, figures and tables of every GPU of the traces, as one HTML page that needs nothing else.

    ``rules`` and ``within`` are those of ``exposures``. What the traces say, kernel names above all, stands in the
    page as text and never as markup. The same traces give the same page.

    Raises:
        TraceError: a trace has no annotation ``within``, or nothing was launched inside it.

    Example:
        >>> import json, tempfile, pathlib
        >>> from counterflow.report import trace_page
        >>> from counterflow.trace import open_trace
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "trace.json"
        >>> event = {"ph": "X", "cat": "kernel", "name": "<script>", "pid": 0, "tid": 7, "ts": 0, "dur": 10}
        >>> _ = path.write_text(json.dumps({"traceEvents": [event]}))
        >>> page = trace_page([open_trace(path)])
        >>> page.num_gpus, page.num_slices, page.html.startswith("<!doctype html>")
        (1, 1, True)
    """
    data = data_of(traces, rules, within)
    return Page(_html(traces, data), len(data.gpus), data.num_slices, data.num_left_out, data.is_timeline)


def embedded(data: object) -> str:
    """JSON that can stand inside a script element: ASCII, and without the letters that markup is made of.

    Example:
        >>> embedded(["</script>", "&"])
        '["\\\\u003c/script\\\\u003e","\\\\u0026"]'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _html(traces: Sequence[Trace], data: Data) -> str:
    from markupsafe import Markup

    style = _beside("page.css")
    script = "(() => {\n" + "\n".join(map(_beside, _SCRIPTS)) + "})();\n"
    names = [_whole(trace.file) for trace in traces]
    warnings = [(_whole(trace.file), _whole(w)) for trace in traces for w in data.warnings_of(trace)]
    return _template().render(
        title=_title(names),
        files=names,
        warnings=warnings,
        gpus=data.gpus,
        left_out=data.left_out,
        about_clocks=data.about_clocks,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=Markup(embedded(data.as_json())),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # late: nothing but a page needs it

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_beside("page.html.jinja"))


def _title(names: list[str]) -> str:
    first = PurePath(names[0]).name if names else "no traces"
    return first if len(names) < 2 else f"{first} and {len(names) - 1} more"


def _whole(text: str) -> str:
    """Names of files may hold bytes that are no text, which no page can be written with."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _beside(name: str) -> str:
    return (files("counterflow.report.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
