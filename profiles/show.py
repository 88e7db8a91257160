"""Draw the profiles and write their figures into the README of this folder.

python profiles/show.py profiles
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from counterflow.files import write_text
from counterflow.report import line_plot
from counterflow.report.drawing import draw_text, px, safe, style
from counterflow.report.palette import ink
from counterflow.trace import Rules, open_trace
from counterflow.trace.phases import phases_of

RULES = Path(__file__).with_name("rules.json")
MODES = ("training", "prefill", "decode")
SUFFIXES = ("", "-20-ctas")

# --- pictures ------------------------------------------------------------------------------------------------

_WIDTH, _LEFT, _LANE, _TOP = 1500, 90, 34, 52
_COLOURS = {
    "attn": "#f5b444",
    "mlp": "#63be5b",
    "shared": "#b9e38d",
    "tail": "#d0d7de",
    "dispatch": "#86bdf7",
    "combine": "#c297ff",
}
_DARK_OF = {"(B)": 0.78, "(W)": 0.6, "1": 0.78}
"""A backward, its weights and the second micro-batch are darker than the first's forward."""


class Stretch(NamedTuple):
    """A step on its lane, in milliseconds from the first one's start."""

    name: str
    start: float
    end: float


def picture(path: Path, title: str) -> str:
    """The steps of a profile on two lanes."""
    lanes = {"compute": list(_stretches(path, wire=False)), "wire": list(_stretches(path, wire=True))}
    whole = max(stretch.end for lane in lanes.values() for stretch in lane)
    scale = (_WIDTH - _LEFT - 20) / whole
    height = _TOP + 2 * _LANE + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{safe(title)}</title>",
        f"<style>{style(None)}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
        draw_text(16, 26, title, "title"),
    ]
    parts += _legend()
    y = _TOP + 2 * _LANE
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if whole / step <= 16)
    for tick in range(int(whole / step) + 1):
        x = _LEFT + tick * step * scale
        parts.append(f'<path class="axis" d="M{px(x)} {_TOP}V{y + 4}"/>')
        parts.append(f'<text class="tick note" x="{px(x)}" y="{y + 18}">{tick * step:g}</text>')
    parts.append(draw_text(_WIDTH - 30, y + 32, "ms", "note"))
    for number, (lane, stretches) in enumerate(lanes.items()):
        y = _TOP + number * _LANE
        parts.append(f'<text class="rank" x="{_LEFT - 10}" y="{y + 19}">{lane}</text>')
        parts += (_drawn(stretch, y, scale) for stretch in stretches)
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> Iterator[str]:
    x = _WIDTH - 700
    for part, colour in _COLOURS.items():
        yield f'<rect x="{x}" y="16" width="12" height="12" fill="{colour}"/>' + draw_text(x + 17, 26, part)
        x += 27 + 7 * len(part)
    yield draw_text(x + 6, 26, "darker: backward, weights, or the second micro-batch", "note")


def _drawn(stretch: Stretch, y: float, scale: float) -> str:
    width = (stretch.end - stretch.start) * scale
    fill = _fill(stretch.name)
    x = _LEFT + stretch.start * scale
    hover = f"{stretch.name}, {stretch.end - stretch.start:.3f} ms"
    drawn = (
        f'<rect x="{px(x)}" y="{y}" width="{px(max(width, 0.5))}" height="{_LANE - 6}" fill="{fill}">'
        f"<title>{safe(hover)}</title></rect>"
    )
    if width > 6.6 * len(stretch.name) + 4:
        middle = f'x="{px(x + width / 2)}" y="{y + 18}"'
        drawn += f'<text class="tick" {middle} style="fill:{ink(fill)}">{safe(stretch.name)}</text>'
    return drawn


def _fill(name: str) -> str:
    part = re.split(r"[-\d(]", name)[0]
    share = next((share for mark, share in _DARK_OF.items() if name.endswith(mark)), 1.0)
    channels = (round(channel * share) for channel in bytes.fromhex(_COLOURS[part][1:]))
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _stretches(path: Path, *, wire: bool) -> Iterator[Stretch]:
    """Neighbouring pieces of one step as one."""
    trace = open_trace(path)
    classes = Rules.read(RULES).classify(trace.work, trace.names, trace.sms)
    phases = phases_of(trace, classes)
    names = [phases.names[row] if row >= 0 else "" for row in phases.rows.tolist()]
    rows = zip(names, trace.work.start_ns.tolist(), trace.work.end_ns.tolist(), strict=True)
    carries = ("dispatch", "combine")
    mine = sorted((start, end, name) for name, start, end in rows if name and name.startswith(carries) == wire)
    origin = int(trace.work.start_ns.min())
    for name, run in groupby(mine, key=lambda piece: piece[2]):
        pieces = list(run)
        yield Stretch(name, (pieces[0][0] - origin) / 1e6, (max(end for _, end, _ in pieces) - origin) / 1e6)


# --- tables --------------------------------------------------------------------------------------------------


def transports_table(mode: dict[str, Any]) -> str:
    """Figures by transport."""
    heads = ["", "sequential", "compute alone", "wire alone", "overlapped", "hidden", "max / overlapped"]
    heads += ["in a stream", "compute alone there", "hidden", "max / stream"]
    heads += ["compute beside as many idle CTAs", "peak GiB"]
    rows = [
        [
            name,
            *_shares(found),
            f"{found['compute_on_the_other_sms_ms']:.1f}" if "compute_on_the_other_sms_ms" in found else "",
            f"{found['peak_gib']:.1f}" if "peak_gib" in found else "",
        ]
        for name, found in sorted(mode["transports"].items(), key=lambda item: _ctas(item[0]))
    ]
    return _table(heads, rows)


def _shares(found: dict[str, Any]) -> list[str]:
    """Of one pair, and of one more in a stream of them."""
    return [
        *(f"{found[key]:.1f}" for key in ("sequential_ms", "compute_ms", "wire_ms", "overlapped_ms")),
        f"{found['overlapped_hidden']:.0%}",
        f"{found['overlapped_of_the_longer']:.3f}",
        *(f"{found[key]:.1f}" for key in ("steady_ms", "steady_compute_ms")),
        f"{found['steady_hidden']:.0%}",
        f"{found['steady_of_the_longer']:.3f}",
    ]


def two_gpus_table(results: dict[str, Any]) -> str:
    """Figures by NCCL's channels."""
    heads = ["channels", "sequential", "compute alone", "wire alone", "overlapped", "hidden", "max / overlapped"]
    heads += ["in a stream", "compute alone there", "hidden", "max / stream"]
    channels = sorted(filter(str.isdigit, results), key=int)
    told = f"{results['gpu']} × 2, PyTorch {results['torch']}, {results['library']}"
    size = f"{results[channels[0]]['transfer_bytes'] / 1e6:.0f} MB in each direction a transfer"
    return f"{told}; {size}.\n\n{_table(heads, [[number, *_shares(results[number])] for number in channels])}"


def decode_table(graphs: dict[str, Any]) -> str:
    """Two micro-batches beside one, in CUDA graphs."""
    heads = ["wire / compute", "one micro-batch of 128, ms", "two of 64, ms", "gain", "by the roofline", "of it"]
    rows = [
        [
            *(f"{row[key]:.2f}" for key in ("wire_over_compute", "single_ms")),
            f"{row['pair_ms']:.2f}" + (" in the order of prefill" if row["order"] == "prefill" else ""),
            *(f"{row[key]:.2f}" for key in ("gain", "roofline_gain", "of_the_roofline")),
        ]
        for row in graphs["rows"]
    ]
    paid = graphs["pays_from"]
    told = "nowhere in this range" if paid is None else f"from {paid:.2f} on" if paid else "everywhere in this range"
    roofs = [value for key, value in graphs.items() if key.startswith("roofline_of")]
    return (
        f"{_table(heads, rows)}\n\nSplitting pays {told}. Compute alone takes {graphs['single_compute_ms']:.2f} ms in "
        f"one micro-batch (roofline {roofs[1]:.2f}) and {graphs['pair_compute_ms']:.2f} ms in two (roofline "
        f"{2 * roofs[0]:.2f})."
    )


def actions_table(actions: dict[str, float]) -> str:
    """Of a chunk of four layers."""
    names = {"forward_us": "F", "backward_us": "B", "input_us": "I", "weight_us": "W", "overlapped_us": "F&B"}
    return _table(list(names.values()), [[f"{actions[key] / 1e3:.1f}" for key in names]])


def curve(mode: str, transports: dict[str, Any]) -> str:
    """The price of communication by multiprocessors."""
    ordered = sorted(transports, key=_ctas)
    lines = {
        label: [transports[name][key] for name in ordered]
        for label, key in (("overlapped", "overlapped_ms"), ("compute alone", "compute_ms"), ("wire alone", "wire_ms"))
    }
    title = f"{mode}: the same bytes by copy engines (0) or by so many CTAs"
    return line_plot(title, "CTAs", "ms", [_ctas(name) for name in ordered], lines)


def _ctas(transport: str) -> int:
    """Copy engines take none."""
    return int(transport.split()[0]) if transport[0].isdigit() else 0


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """As the module says."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "profiles")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    blocks: dict[str, str] = {"machine": f"{results['gpu']}, PyTorch {results['torch']}; {results['not_shown']}."}
    for mode in (mode for mode in MODES if mode in results["modes"]):
        found = results["modes"][mode]
        blocks[mode] = transports_table(found)
        if len(found["transports"]) > 2:
            write_text(folder / f"{mode}-ctas.svg", curve(mode, found["transports"]))
        if "actions" in found:
            blocks["actions"] = actions_table(found["actions"])
        if "graphs" in found:
            blocks["graphs"] = decode_table(found["graphs"])
        for suffix in SUFFIXES:
            path = folder / f"{mode}{suffix}.json.gz"
            if path.exists() and results["gpu"] != "CPU":  # whose traces have no lanes
                by = "20 CTAs" if suffix else "copy engines"
                write_text(folder / f"{mode}{suffix}.svg", picture(path, f"{mode}, four layers, rows by {by}"))
    two_gpus = folder / "two-gpus.json"
    if two_gpus.exists():
        blocks["two-gpus"] = two_gpus_table(json.loads(two_gpus.read_text(encoding="utf-8")))
        path = folder / "two-gpus-0.json.gz"
        if path.exists():
            write_text(folder / "two-gpus.svg", picture(path, "training, four layers, rows between two GPUs by NCCL"))
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{readme} has no place for {name}; put <!-- {name} --> and <!-- end --> into it")
        text = pattern.sub(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
    write_text(readme, text)


if __name__ == "__main__":
    main()
