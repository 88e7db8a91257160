"""How many lines of code does a schedule take, ours and the peers'?

Counts the lines that hold code: no blank lines, no comments, no docstrings. Ours are the whole file of a schedule's
family with its imports. torch's are the method of its class that makes the order and the functions that this calls,
without the rest of the class, from the torch that is installed. Another peer's file is counted where it is named:

    python benchmarks/generator_lines.py
    python benchmarks/generator_lines.py --peer zbv=path/to/the/peers/zbv.py

Prints a table with the ratio to each peer.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import textwrap
import tokenize
from pathlib import Path

from torch.distributed.pipelining import schedules

from counterflow.schedule import GENERATORS

ROUNDS = [schedules._get_1f1b_rank_ops, schedules._get_warmup_ops]
TORCH = {
    "gpipe": [schedules.ScheduleGPipe._get_pipeline_order],
    "1f1b": [schedules.Schedule1F1B._get_pipeline_order],
    "interleaved-1f1b": [schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations, *ROUNDS],
    "zb1p": [schedules.ScheduleInterleavedZeroBubble._calculate_single_rank_operations, *ROUNDS],
    "zbv": [schedules.ScheduleZBVZeroBubble._calculate_single_rank_operations],
    "dualpipev": [schedules.ScheduleDualPipeV._calculate_single_rank_operations],
}
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a peer's file for NAME; repeatable",
    )
    peers = dict(peer.split("=", maxsplit=1) for peer in parser.parse_args().peer)
    print(f"{'schedule':26} {'our file':26} {'lines':>5} {'torch':>6} {'ratio':>6} {'peer':>6} {'ratio':>6}")
    for name, generator in GENERATORS.items():
        path = Path(inspect.getsourcefile(getattr(generator, "func", generator)) or "")
        ours = code_lines(path.read_text(encoding="utf-8"))
        torchs = sum(code_lines(inspect.getsource(part)) for part in TORCH.get(name, []))
        peers_ = code_lines(Path(peers[name]).read_text(encoding="utf-8")) if name in peers else 0
        print(f"{name:26} {path.name:26} {ours:5} {against(ours, torchs)} {against(ours, peers_)}")


def against(ours: int, theirs: int) -> str:
    return f"{theirs:6} {ours / theirs:6.2f}" if theirs else f"{'-':>6} {'-':>6}"


def code_lines(source: str) -> int:
    source = textwrap.dedent(source)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


if __name__ == "__main__":
    main()
