"""Hide the annotations of traces and tell phases by the order of kernels: how much GPU time is told right?

    python benchmarks/phases_by_order.py deepseek_train.json.gz prefill.json.gz

The truth is the trace's own annotations, of any name that tells a part of a layer: mlp(B), ATTN(F), DISPATCH0.
Shared experts count as experts, as in the published profile. Work outside of such annotations is left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

from counterflow.errors import CounterflowError
from counterflow.trace import Annotations, Rules, Trace, open_trace
from counterflow.trace.parts import EXPERTS, SHARED, part_of
from counterflow.trace.phases import Phases, phases_of


def main(path: str) -> None:
    trace = open_trace(path)
    truth = told(trace)
    if truth.source != "annotations" or not any(truth.parts):
        sys.exit(f"{path}: no annotation there names a part of a layer; give a trace whose annotations do")
    hidden = replace(trace, annotations=Annotations.empty())
    print(path)
    show("annotations hidden", trace, truth, told(hidden))
    show("launches as well", trace, truth, told(replace(hidden, launches=trace.launches.empty())))


def told(trace: Trace) -> Phases:
    return phases_of(trace, Rules().classify(trace.work, trace.names, trace.sms))


def show(title: str, trace: Trace, truth: Phases, found: Phases) -> None:
    lengths = (trace.work.end_ns - trace.work.start_ns).tolist()
    times: Counter[tuple[str, str]] = Counter()
    for length, one, other in zip(lengths, truth.rows.tolist(), found.rows.tolist(), strict=True):
        times[label(truth, one), label(found, other)] += length
    times = Counter({pair: ns for pair, ns in times.items() if pair[0]})
    right = sum(ns for (one, other), ns in times.items() if one == other)
    share = f"{right / times.total():.2%} of {times.total() / 1000:,.0f} µs of GPU time"
    print(f"  {title}: {share} told right, by {found.source}")
    for (one, other), ns in times.most_common():
        if one != other:
            print(f"    {ns / 1000:>12,.0f} µs of {one} told as {other or 'nothing'}")


def label(phases: Phases, row: int) -> str:
    part = part_of(phases.names[row]) if row >= 0 else None
    return "" if part is None else str(part._replace(part=EXPERTS) if part.part == SHARED else part)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        for path in sys.argv[1:]:
            main(path)
    except CounterflowError as error:
        sys.exit(str(error))
