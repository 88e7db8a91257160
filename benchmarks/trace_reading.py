"""How fast a trace is read and its exposed communication found: counterflow beside json, msgspec and HTA.

    python benchmarks/trace_reading.py TRACE [--megabytes 100 1000] [--folder DIR] [--peers-limit-s 600]

TRACE is a real trace (.json or .json.gz) of the PyTorch profiler. It is written again and again, each copy later in
time and with correlation ids of its own, until the file has the size. Each contender runs in a process of its own,
and its peak memory is that of its largest process; shared pages count in each.
HTA takes part where it can be imported (pip install HolisticTraceAnalysis).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINETO_ID = re.compile(r'("(?:correlation|External id|id)": ?)(\d+)')
TIME = re.compile(r'("ts": ?)(\d+)')


def write_repeated(trace: Path, target: Path, megabytes: int) -> None:
    """Copies of the trace's events, shifted, as text: the formatting is the profiler's own."""
    packed = trace.read_bytes()
    text = (gzip.decompress(packed) if trace.suffix == ".gz" else packed).decode()
    start = re.search(r'"traceEvents"\s*:\s*\[', text).end()
    body_end = text.rindex("}", 0, text.rindex("]", 0, text.rindex("}"))) + 1
    body = text[start:body_end]
    times = [int(t) for _, t in TIME.findall(body)]
    span = max(times) - min(times) + 1_000
    ids = max(int(i) for _, i in KINETO_ID.findall(body)) + 1
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        file.write(text[:start])
        written = copy = 0
        while written < megabytes * 1_000_000:
            shifted = TIME.sub(lambda m, by=copy * span: f"{m[1]}{int(m[2]) + by}", body)
            shifted = KINETO_ID.sub(lambda m, by=copy * ids: f"{m[1]}{int(m[2]) + by}", shifted)
            written += file.write(("," if copy else "") + shifted)
            copy += 1
        file.write(text[body_end:])


# --- contenders: each runs alone, with the file as its argument ----------------------------------------------

OURS = (
    "from counterflow.trace import exposures, open_trace",
    "result = [e.communication_us for e in exposures(open_trace(path))]",
)
OURS_READ = ("from counterflow.trace import open_trace", "result = len(open_trace(path).work)")
JSON = ("import json", 'result = len(json.load(open(path, encoding="utf-8"))["traceEvents"])')
MSGSPEC = (
    """
import msgspec
class Arguments(msgspec.Struct, gc=False):
    device: int | None = None
    stream: int | None = None
    correlation: int | None = None
    grid: list[int] | None = None
    block: list[int] | None = None
class Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: int | float | None = None
    dur: int | float | None = None
    pid: int | str = 0
    tid: int | str = 0
    args: Arguments | None = None
class File(msgspec.Struct, gc=False):
    traceEvents: list[Event]
""",
    'result = len(msgspec.json.decode(open(path, "rb").read(), type=File).traceEvents)',
)
HTA = (
    """
import logging
logging.disable(logging.CRITICAL)
from hta.trace_analysis import TraceAnalysis
""",
    'result = TraceAnalysis(trace_files={0: path}).get_comm_comp_overlap(visualize=False).to_dict("records")',
)
CONTENDERS = {
    "counterflow, read and overlap": OURS,
    "counterflow, read": OURS_READ,
    "json": JSON,
    "msgspec, fully typed": MSGSPEC,
    "HTA, read and overlap": HTA,
}

# The imports are not timed. The peak of the process and of its largest child are measured inside it.
FRAME = """
import json, resource, sys, time
path = sys.argv[1]
{imports}
started = time.perf_counter()
{code}
seconds = time.perf_counter() - started
peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([seconds, *peaks, str(result)]))
"""


def measure(python: str, contender: tuple[str, str], file: Path, limit_s: float) -> tuple[float, int, int, str] | str:
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", FRAME.format(imports=contender[0], code=contender[1]), str(file)],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:100]
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many is taken")
    parser.add_argument("--peers-limit-s", type=float, default=600)
    parser.add_argument("--hta-python", default=sys.executable, help="an interpreter that has HTA")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for megabytes in arguments.megabytes:
            file = folder / f"trace_{megabytes}.json"
            if not file.exists():
                write_repeated(arguments.trace, file, megabytes)
            compare(file, arguments)


def compare(file: Path, arguments: argparse.Namespace) -> None:
    print(f"\n{file.name}: {file.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':32}{'seconds':>9}{'of ours':>9}{'peak MB':>9}{'of a child':>12}")
    ours = None
    for name, contender in CONTENDERS.items():
        python = arguments.hta_python if name.startswith("HTA") else sys.executable
        rounds = 1 if name.startswith("HTA") else arguments.rounds
        runs = [measure(python, contender, file, arguments.peers_limit_s) for _ in range(rounds)]
        failed = [run for run in runs if isinstance(run, str)]
        if failed:
            print(f"{name:32}{failed[0]}")
            continue
        seconds, peak, child, result = min(runs)
        ours = ours or seconds
        print(f"{name:32}{seconds:9.2f}{seconds / ours:8.1f}×{peak:9}{child:12}", flush=True)
        if "overlap" in name:
            print(f"  found: {result[:100]}")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
