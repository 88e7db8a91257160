"""The page of a trace: exact data, nothing fetched, and no name in it that is markup."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow import Costs, dualpipe, simulate
from counterflow.report import Page, trace_page
from counterflow.report.page import data as page_data
from counterflow.report.page.lanes import NONE, rows_of
from counterflow.report.page.packed import packed
from counterflow.report.palette import contrast
from counterflow.timeline import write_chrome
from counterflow.trace import CLASSES, exposures, open_trace, open_traces
from traces import Data, annotation, compact, kernel, launch, real_trace, sample, trace, traces

HOSTILE = [
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<!--<script>",
    "\"'><svg onload=window.hit=1>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; line\u2028paragraph\u2029end",
    "]]> \\u003c/script\\u003e",
]
NUMBERS = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "f64": "<f8"}


def saved(folder: Path, data: Data, name: str = "trace.json") -> Path:
    path = folder / name
    path.write_text(compact(data))
    return path


def page_of(*paths: Path, **options: Any) -> Page:
    return trace_page(open_traces(paths), **options)


def data_in(page: Page) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(found[0]) if found else {"gpus": []}


def numbers(column: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(column["base64"]), dtype=NUMBERS[column["type"]]).astype(np.int64)


def intervals(lane: dict[str, Any]) -> list[tuple[int, int]]:
    start = np.cumsum(numbers(lane["after"]))
    return list(zip(start.tolist(), (start + numbers(lane["length"])).tolist(), strict=True))


def hostile(name: str) -> Data:
    """A trace in which a name stands wherever a trace can have one."""
    events = [
        annotation(name, 0, 10),
        launch(2, 1),
        kernel(name, 7, 20, 30, 1),
        kernel("ncclDevKernel_" + name, 20, 40, 30, 1),
    ]
    return trace(events, traceName=name)


class Elements(HTMLParser):
    """The elements of a page, with the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


# --- nothing runs, nothing is fetched -----------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_adds_no_element_to_the_page(name: str, tmp_path: Path) -> None:
    plain = page_of(saved(tmp_path, hostile("gemm"), "a.json"))
    planted = page_of(saved(tmp_path, hostile(name), name.replace("/", "") + ".json"))
    assert Elements(planted.html).found == Elements(plain.html).found
    assert name in data_in(planted)["names"]
    assert name in data_in(planted)["phases"]


def test_the_data_holds_no_letter_of_markup(tmp_path: Path) -> None:
    page = page_of(saved(tmp_path, hostile("".join(HOSTILE))))
    [text] = re.findall(r'id="data">(.*?)</script>', page.html, re.DOTALL)
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_a_file_whose_name_is_no_text_gives_a_page(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff<b>.json"))
    path.write_text(compact(sample(1)))
    page = page_of(path)
    page.html.encode("utf-8")
    assert "&lt;b&gt;.json" in page.html
    assert "<b>" not in page.html


def test_the_page_names_no_address(tmp_path: Path) -> None:
    html = page_of(saved(tmp_path, sample())).html
    assert not re.findall(r"https?:|//[\w.]+\.\w+/|\bsrc\s*=|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", html)
    assert re.findall(r'href="([^"]*)"', html) == ["data:,"]


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    html = page_of(saved(tmp_path, sample())).html
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


def test_the_script_writes_no_markup() -> None:
    scripts = [file for file in files("counterflow.report.page").iterdir() if file.name.endswith(".js")]
    assert len(scripts) > 3
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|srcdoc", text
        )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_every_ground(theme: str) -> None:
    style = (files("counterflow.report.page") / "page.css").read_text(encoding="utf-8")
    [block] = re.findall(rf':root\[data-theme="{theme}"\] \{{(.*?)\}}', style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    pairs = [(name, name.removeprefix("on-")) for name in colours if name.startswith("on-")]
    assert len(pairs) == len(CLASSES)
    pairs += [(text, ground) for text in ("ink", "soft", "exposed", "accent") for ground in ("ground", "panel")]
    assert [pair for pair in pairs if contrast(colours[pair[0]], colours[pair[1]]) < 4.5] == []


def test_the_template_engine_loads_late() -> None:
    code = "import sys, counterflow.report; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


# --- what stands in it --------------------------------------------------------------------------------------


@given(traces)
def test_every_slice_of_any_trace_stands_in_the_page_to_the_nanosecond(tmp_path_factory, data: Data) -> None:
    path = saved(tmp_path_factory.mktemp("any"), data)
    found, page = open_trace(path), page_of(path)
    read = data_in(page)
    for gpu, exposure in zip(read["gpus"], exposures(found), strict=True):
        lanes = [lane for lane in gpu["lanes"] if lane["kind"] == "stream"]
        names = [numbers(read["runs"]["name"])[numbers(lane["run"])] for lane in lanes]
        drawn = sorted(
            (
                start + exposure.start_ns - gpu["start_ns"],
                end + exposure.start_ns - gpu["start_ns"],
                read["names"][name],
            )
            for lane, named in zip(lanes, names, strict=True)
            for (start, end), name in zip(intervals(lane), named.tolist(), strict=True)
        )
        work = found.work.rows(found.work.device == exposure.device)
        assert drawn == sorted(
            (start, end, found.names[name])
            for start, end, name in zip(work.start_ns.tolist(), work.end_ns.tolist(), work.name.tolist(), strict=True)
        )


@given(traces)
def test_the_unions_add_up_to_the_figures(tmp_path_factory, data: Data) -> None:
    path = saved(tmp_path_factory.mktemp("any"), data)
    for gpu, exposure in zip(data_in(page_of(path))["gpus"], exposures(open_trace(path)), strict=True):
        totals = {
            lane["kind"]: sum(end - start for start, end in intervals(lane)) / 1000
            for lane in gpu["lanes"]
            if lane["kind"] not in ("stream", "phase")
        }
        assert totals == {
            "compute": exposure.compute_us,
            "hidden": exposure.overlapped_us,
            "exposed": exposure.exposed_us,
        }
        assert gpu["window_us"] == exposure.window_us
        assert [piece[:2] for piece in gpu["pieces"]] == [[p.start_us, p.length_us] for p in exposure.pieces]


@given(traces)
def test_the_slices_of_a_lane_never_overlap(tmp_path_factory, data: Data) -> None:
    for gpu in data_in(page_of(saved(tmp_path_factory.mktemp("any"), data)))["gpus"]:
        for lane in gpu["lanes"]:
            slices = intervals(lane)
            assert all(one[1] <= other[0] for one, other in zip(slices, slices[1:], strict=False))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=20), st.integers(1, 4))
def test_each_slice_is_in_the_first_row_that_is_free(spans: list[tuple[int, int]], most: int) -> None:
    spans = sorted((start, start + length) for start, length in spans)
    placed: list[list[tuple[int, int]]] = [[] for _ in range(most)]
    expected = []
    for start, end in spans:
        free = [row for row in range(most) if all(until <= start for _, until in placed[row])]
        expected.append(free[0] if free else NONE)
        if free:
            placed[free[0]].append((start, end))
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    assert rows_of(starts, ends, most).tolist() == expected


@pytest.mark.parametrize("most", [255, 256, 65_536, 2**32, 2**53 - 1])
def test_packed_numbers_are_exact(most: int) -> None:
    values = np.array([0, 1, most], dtype=np.int64)
    assert numbers(packed(values)).tolist() == values.tolist()


def test_kernels_have_their_class_phase_and_blocks(tmp_path: Path) -> None:
    read = data_in(page_of(saved(tmp_path, sample(1))))
    [gpu] = read["gpus"]
    columns = {key: numbers(column).tolist() for key, column in read["runs"].items()}
    kernels = [read["names"][name] for name in columns["name"]]
    classes = [read["classes"][kind] for kind in columns["class"]]
    told = {
        (lane["label"], kernels[run], classes[run], read["phases"][phase], columns["blocks"][run])
        for lane in gpu["lanes"]
        if lane["kind"] == "stream"
        for run, phase in zip(numbers(lane["run"]).tolist(), numbers(lane["phase"]).tolist(), strict=True)
    }
    assert ("stream 27", "void deep_ep::internode::dispatch<8>(int4*)", "transfer", "dispatch(F)", 20) in told
    assert ("stream 7", "void gemm<{lambda(int)#1}>(float*)", "compute", "mlp(B)", 132) in told


def test_what_hides_what_is_that_of_the_exposure(tmp_path: Path) -> None:
    path = saved(tmp_path, sample(2))
    [exposure], [gpu] = exposures(open_trace(path)), data_in(page_of(path))["gpus"]
    assert exposure.hiding
    assert gpu["hiding"] == [
        [h.name, h.communication_us, h.exposed_us, [[s.phase, s.us] for s in h.under]] for h in exposure.hiding
    ]


def test_the_same_traces_give_the_same_page(tmp_path: Path) -> None:
    path = saved(tmp_path, sample())
    assert page_of(path) == page_of(path)


def test_a_timeline_of_ours_has_a_lane_for_each_rank(tmp_path: Path) -> None:
    timeline = simulate(dualpipe(4, 8), Costs())
    write_chrome(timeline, tmp_path / "timeline.json")
    page = page_of(tmp_path / "timeline.json")
    read = data_in(page)
    assert [gpu["title"] for gpu in read["gpus"]] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert page.num_slices == len(timeline)
    assert read["is_timeline"]
    assert {"forward", "backward", "forward & backward"} <= set(read["phases"])
    assert len(read["hues"][read["phases"].index("forward & backward")]) == 2


def test_gpus_of_the_same_rank_are_told_apart_by_what_differs_in_their_files(tmp_path: Path) -> None:
    paths = []
    for run in ("before", "after"):
        (tmp_path / run).mkdir()
        paths.append(saved(tmp_path / run, trace([kernel("k", 7, 0, 10)]), "a_host_with_a_long_name_4711.json"))
    titles = [gpu["title"] for gpu in data_in(page_of(*paths))["gpus"]]
    assert titles == ["before: rank 3, GPU 0", "after: rank 3, GPU 0"]
    assert [gpu["title"] for gpu in data_in(page_of(paths[0]))["gpus"]] == ["rank 3, GPU 0"]


def test_within_an_annotation_the_window_is_its_own(tmp_path: Path) -> None:
    path = saved(
        tmp_path, trace([annotation("step", 0, 5), launch(1, 1), kernel("a", 7, 10, 5, 1), kernel("b", 7, 90, 5, 2)])
    )
    [gpu] = data_in(page_of(path, within="step"))["gpus"]
    assert gpu["window_us"] == 5
    assert [name for name in data_in(page_of(path, within="step"))["names"] if name] == ["a"]


# --- what is left out is said -------------------------------------------------------------------------------


def test_slices_beyond_what_a_page_holds_are_the_shortest_and_counted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(page_data, "MOST_SLICES", 10)
    lengths = [7, 3, 9, 1, 5, 8, 2, 6, 4, 10, 12, 11]
    page = page_of(saved(tmp_path, trace([kernel("k", 7, 20 * i, n) for i, n in enumerate(lengths)])))
    [gpu] = data_in(page)["gpus"]
    [lane] = [lane for lane in gpu["lanes"] if lane["kind"] == "stream"]
    assert [end - start for start, end in intervals(lane)] == [1000 * n for n in lengths if n > 2]
    assert (page.num_slices, page.num_left_out) == (10, 2)
    assert "2 slices are not drawn, for a page holds 10 of them: the shortest, none above 2 µs." in page.html
    assert gpu["kernels"][0][2] == 12


def test_work_that_finds_no_row_is_counted(tmp_path: Path) -> None:
    page = page_of(saved(tmp_path, trace([kernel("k", 7, i, 100) for i in range(70)])))
    assert (page.num_slices, page.num_left_out) == (64, 6)
    assert "6 slices are not drawn" in page.html


def test_clocks_that_do_not_meet_are_told(tmp_path: Path) -> None:
    far = [saved(tmp_path, trace([kernel("k", 7, at, 10)]), f"{at}.json") for at in (0, 1000)]
    page = page_of(*far)
    assert "clocks of these traces do not meet" in page.html
    assert [gpu["start_ns"] for gpu in data_in(page)["gpus"]] == [0, 0]
    near = [saved(tmp_path, trace([kernel("k", 7, at, 10)]), f"{at}.json") for at in (0, 4)]
    assert "do not meet" not in page_of(*near).html
    assert [gpu["start_ns"] for gpu in data_in(page_of(*near))["gpus"]] == [0, 4000]


def test_ranks_are_on_one_clock_by_the_collectives_they_share(tmp_path: Path) -> None:
    paths = []
    for rank, ahead in ((0, 0), (1, 7)):
        events = [kernel("ncclDevKernel_AllReduce", 20, 40 * i + i % 3 + ahead, 30 - i % 3) for i in range(6)]
        events.append(kernel("gemm", 7, 5 + ahead, 10))
        data = trace(events, distributedInfo={"rank": rank})
        paths.append(saved(tmp_path, data, f"{rank}.json"))
    page = page_of(*paths)
    lanes = [lane for gpu in data_in(page)["gpus"] for lane in gpu["lanes"] if lane["label"] == "stream 20"]
    assert [numbers(lane["after"]).tolist() for lane in lanes] == [[0, 41_000, 41_000, 38_000, 41_000, 41_000]] * 2
    assert "one clock by the ends of 6 collectives that they share, to 0 µs" in page.html
    assert "one clock" not in page_of(paths[0]).html


def test_warnings_stand_in_the_page_with_the_file_where_there_are_several(tmp_path: Path) -> None:
    path = saved(tmp_path, trace([kernel("k", 7, 0, 10, 1), kernel("k", 7, 20, 10, 2), launch(0, 1)]))
    other = saved(tmp_path, trace([kernel("k", 7, 0, 10)]), "<other>.json")
    assert "1 piece of GPU work without a launch record" in page_of(path).html
    assert f"{path}</span>: 1 piece" in page_of(path, other).html


def test_traces_without_gpu_work_give_a_page_that_says_so(tmp_path: Path) -> None:
    page = page_of(saved(tmp_path, trace([])))
    assert "This trace holds no GPU work" in page.html
    assert (page.num_gpus, page.num_slices) == (0, 0)


# --- the verb -----------------------------------------------------------------------------------------------


def test_the_verb_writes_the_page(tmp_path: Path, out) -> None:
    path, target = saved(tmp_path, sample(2)), tmp_path / "new" / "page.html"
    assert out("trace", "report", path, "-o", target) == f"wrote {target}: 1 GPU, 10 slices: open it in a browser\n"
    assert target.read_text(encoding="utf-8") == page_of(path).html
    lone = saved(tmp_path, trace([kernel("k", 7, 0, 10)]), "lone.json")
    assert ": 1 GPU, 1 slice: " in out("trace", "report", lone, "-o", tmp_path / "lone.html")
    write_chrome(simulate(dualpipe(2, 4), Costs()), tmp_path / "timeline.json")
    assert ": 2 ranks, 16 slices: " in out("trace", "report", tmp_path / "timeline.json", "-o", tmp_path / "t.html")
    said = json.loads(out("trace", "report", path, "-o", target, "--json"))
    assert said == {"file": str(target), "gpus": 1, "slices": 10, "left_out": 0, "warnings": []}


def test_the_verb_refuses_what_gives_no_page(tmp_path: Path, refusal) -> None:
    path = saved(tmp_path, sample(1))
    assert refusal("trace", "report", path, "-o", tmp_path / "page.pdf").endswith("a report is a page: give an .html")
    assert "--output" in refusal("trace", "report", path)
    assert "cannot be read" in refusal("trace", "report", tmp_path / "none.json", "-o", tmp_path / "page.html")
    assert "no annotation 'x'" in refusal("trace", "report", path, "--within", "x", "-o", tmp_path / "page.html")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"traceEvents": []}), encoding="utf-8")
    assert "no GPU work to draw" in refusal("trace", "report", empty, "-o", tmp_path / "page.html")
    (tmp_path / "same.html").write_bytes(path.read_bytes())
    said = refusal("trace", "report", tmp_path / "same.html", "-o", tmp_path / "same.html")
    assert "is what was read, and would be lost; write to another file" in said
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal("trace", "report", path, "-o", tmp_path / "file" / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_published_profile_has_its_published_figures() -> None:
    page = page_of(real_trace("deepseek_train.json.gz"))
    [gpu] = data_in(page)["gpus"]
    assert (gpu["window_us"], gpu["compute_us"], gpu["communication_us"]) == (129_012, 124_310, 113_440)
    assert (gpu["exposed_us"], gpu["idle_us"]) == (4_190, 497)
    assert sum(len(intervals(lane)) for lane in gpu["lanes"] if lane["kind"] == "stream") == 983
