"""The rules that hold the house together: who imports whom, what loads late, and which names are public."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import counterflow

SOURCE = Path(counterflow.__file__).parent

BASE = {"errors", "files", "loops", "timeline"}
PLANS = BASE | {"schedule", "experts"}
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "loops": set(),
    "timeline": {"errors", "files"},
    "schedule": BASE,
    "experts": BASE,
    "simulator": PLANS,
    "trace": PLANS | {"simulator"},
    "report": PLANS | {"simulator", "trace"},
    "runtime": PLANS,
    "moe": PLANS | {"runtime"},
    "demo": PLANS | {"simulator", "trace", "report", "runtime", "moe"},
    "cli": PLANS | {"simulator", "trace", "report", "runtime", "moe", "demo"},
    "__main__": {"cli"},
}
TORCH_ROOMS = {"runtime", "moe", "demo"}
LEAN_ROOMS = {"runtime", "moe"}  # they run inside other people's training jobs
LEAN_PACKAGES = {"torch", "numpy", "numba", "triton"}

ROOM_OF_PUBLIC_NAME = {
    "Action": "schedule",
    "Costs": "simulator",
    "CounterflowError": "errors",
    "LoadTracker": "experts",
    "Placement": "experts",
    "Schedule": "schedule",
    "Timeline": "timeline",
    "balance": "experts",
    "check": "schedule",
    "compare": "simulator",
    "dualpipe": "schedule",
    "dualpipev": "schedule",
    "gpipe": "schedule",
    "interleaved_1f1b": "schedule",
    "one_f_one_b": "schedule",
    "open_trace": "trace",
    "plan_migration": "experts",
    "rebalance_experts": "experts",
    "simulate": "simulator",
    "zb1p": "schedule",
    "zbv": "schedule",
}

HEAVY = ("numpy", "numba", "msgspec", "typer", "rich", "torch", "jinja2")
# In the order of the arrows.
TORCHLESS = ("errors", "timeline", "schedule", "experts", "simulator", "trace", "report", "cli")


# --- reading the source -------------------------------------------------------------------------------------


def room_of(file: Path) -> str:
    """The room a file belongs to: its first folder, or its own name at the top level."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def rooms_on_disk() -> list[str]:
    return sorted({room_of(file) for file in SOURCE.rglob("*.py")} - {"__init__"})


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module of `package` imports, wherever it stands.

    `from a import b` is a.b, whether b is a module or not. `import_module("a")` is a, and "<computed>" where
    its argument is no literal.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                prefix = ".".join([*parents, *([module] if module else [])])
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=args,
            ):
                literal = args and isinstance(args[0], ast.Constant)
                yield node.lineno, str(args[0].value) if literal else "<computed>"


def imports_of_room(room: str) -> Iterator[tuple[str, str]]:
    """Where (file:line) and what (full dotted name) a room imports."""
    for file in sorted(SOURCE.rglob("*.py")):
        if room_of(file) == room:
            package = ".".join(["counterflow", *file.relative_to(SOURCE).parts[:-1]])
            for line, module in imported_modules(file.read_text(encoding="utf-8"), package):
                yield f"{file.relative_to(SOURCE)}:{line}", module


def arrow_of(module: str) -> str:
    """The room behind a dotted name under counterflow; a public name stands for the room it lives in."""
    name = module.split(".")[1] if "." in module else "counterflow"
    return ROOM_OF_PUBLIC_NAME.get(name, name)


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import os.path, torch.nn as nn
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ..schedule import Action
def late():
    from . import wire
    from .. import cli
    from .wire import Wire
    importlib.import_module("numba")
    __import__(name)
"""
    found = [module for _, module in imported_modules(source, package="counterflow.runtime")]
    assert sorted(found) == [
        "<computed>",
        "counterflow.cli",
        "counterflow.runtime.wire",
        "counterflow.runtime.wire.Wire",
        "counterflow.schedule.Action",
        "numba",
        "os.path",
        "torch.nn",
        "typing.TYPE_CHECKING",
    ]


# --- arrows -------------------------------------------------------------------------------------------------


def test_every_room_on_disk_has_its_arrows_written_down() -> None:
    unknown = set(rooms_on_disk()) - MAY_IMPORT.keys()
    assert not unknown, f"new rooms {sorted(unknown)}: enter them in MAY_IMPORT here and in CONTRIBUTING.md"


@pytest.mark.parametrize("room", rooms_on_disk())
def test_a_room_imports_only_along_the_arrows(room: str) -> None:
    allowed = MAY_IMPORT.get(room, set()) | {room, "__version__"}
    wrong = [
        f"{where} imports {module}"
        for where, module in imports_of_room(room)
        if module == "<computed>" or (module.split(".")[0] == "counterflow" and arrow_of(module) not in allowed)
    ]
    assert not wrong, (
        f"{room} may import only {sorted(MAY_IMPORT.get(room, set()))} of counterflow, by a literal name: "
        f"move the code to the room that may, or hand the value in as an argument:\n" + "\n".join(wrong)
    )


@pytest.mark.parametrize("room", [room for room in rooms_on_disk() if room not in TORCH_ROOMS])
def test_torch_is_imported_by_no_room_below_the_runtime(room: str) -> None:
    wrong = [where for where, module in imports_of_room(room) if module.split(".")[0] == "torch"]
    assert not wrong, (
        f"only {sorted(TORCH_ROOMS)} import torch, not even late elsewhere: move this code there, "
        f"or work on numpy arrays:\n" + "\n".join(wrong)
    )


@pytest.mark.parametrize("room", sorted(LEAN_ROOMS))
def test_the_rooms_that_run_inside_a_training_job_need_little(room: str) -> None:
    allowed = sys.stdlib_module_names | LEAN_PACKAGES | {"counterflow"}
    wrong = [f"{where} imports {m}" for where, m in imports_of_room(room) if m.split(".")[0] not in allowed]
    assert not wrong, (
        f"beside the standard library and counterflow, {room} may import only {sorted(LEAN_PACKAGES)}: "
        f"do without, or move this code to demo or cli:\n" + "\n".join(wrong)
    )


def test_inside_moe_kernels_know_no_model_and_the_model_no_inference() -> None:
    model = {file.stem for file in (SOURCE / "moe").glob("*.py")} - {"__init__"}
    folders = {"kernels": {"kernels", "config"}, "inference": {"inference"} | model}
    wrong = []
    for where, module in imports_of_room("moe"):
        part = where.split(":")[0].split("/")[1]  # a folder, or a file of the model
        allowed = folders.get(part, {"kernels"} | model)
        inside = module.startswith("counterflow.moe.") and part != "__init__.py"
        if inside and module.split(".")[2] not in allowed:
            wrong.append(f"{where} imports {module}")
    assert not wrong, (
        "inside moe kernels/ imports config alone, the model no inference/, and inference/ the model's files alone: "
        "move the code to where it may, or hand the value in:\n" + "\n".join(wrong)
    )


def test_triton_is_imported_by_files_named_for_it() -> None:
    everywhere = [found for room in rooms_on_disk() for found in imports_of_room(room)]
    wrong = [w for w, m in everywhere if m.split(".")[0] == "triton" and not w.split(":")[0].endswith("_kernel.py")]
    assert not wrong, (
        "machines without a GPU lack triton, and pytest leaves *_kernel.py alone: put these into such a file, "
        "and import that where it runs:\n" + "\n".join(wrong)
    )


# --- what loads late ----------------------------------------------------------------------------------------


def in_a_fresh_python(code: str) -> str:
    """The last line that `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"this failed in a fresh interpreter:\n{code}\n{done.stderr}"
    return done.stdout.splitlines()[-1]


def test_importing_counterflow_loads_nothing_heavy() -> None:
    loaded = in_a_fresh_python(
        f"import sys, counterflow; print(' '.join(m for m in {HEAVY} if m in sys.modules) or '-')"
    )
    assert loaded == "-", (
        f"`import counterflow` loads {loaded}: public names are lazy, so put the name into _ROOM_OF "
        f"in __init__.py rather than importing its room there"
    )


@cache
def first_to_load_torch() -> dict[str, str]:
    """One process imports the rooms in turn: for each "-", "torch" if it loads it first, or the error."""
    code = f"""
import importlib, json, sys
report, before = {{}}, False
for room in {TORCHLESS}:
    try:
        module = importlib.import_module("counterflow." + room)
        if module.__file__ is None:
            raise ImportError("the folder has no __init__.py")
        report[room] = "torch" if "torch" in sys.modules and not before else "-"
    except Exception as error:
        report[room] = repr(error)
    before = "torch" in sys.modules
print(json.dumps(report))
"""
    return json.loads(in_a_fresh_python(code))


@pytest.mark.parametrize("room", TORCHLESS)
def test_a_room_below_the_runtime_does_not_load_torch(room: str) -> None:
    outcome = first_to_load_torch()[room]
    assert outcome in {"-", "torch"}, f"counterflow.{room} cannot be imported: {outcome}"
    assert outcome == "-", (
        f"importing counterflow.{room} loads torch: import the room that needs it inside the function that uses it"
    )


@pytest.mark.parametrize("room", sorted(LEAN_ROOMS))
def test_a_room_with_kernels_does_without_triton(room: str) -> None:
    code = f"import sys; sys.modules['triton'] = None; import counterflow.{room}; print('without')"
    assert in_a_fresh_python(code) == "without"


def test_help_on_the_command_line_does_not_load_torch() -> None:
    code = """
import sys
from counterflow.cli import main
sys.argv = ["counterflow", "schedule", "--help"]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print("exit", code or 0, "torch" if "torch" in sys.modules else "-")
"""
    assert in_a_fresh_python(code) == "exit 0 -", (
        "`counterflow schedule --help` has to exit with 0 and without loading torch: "
        "a command imports runtime, moe and demo in its body"
    )


# --- the face -----------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert counterflow.__all__ == sorted(ROOM_OF_PUBLIC_NAME), (
        "a public name is a promise: enter it in __all__ (sorted) and in ROOM_OF_PUBLIC_NAME here"
    )
    assert set(counterflow.__all__) <= set(dir(counterflow))


def test_type_checkers_see_the_same_names_in_the_same_rooms() -> None:
    found = imported_modules((SOURCE / "__init__.py").read_text(encoding="utf-8"), package="counterflow")
    seen = {m.split(".")[2]: m.split(".")[1] for _, m in found if m.startswith("counterflow.")}
    assert seen == ROOM_OF_PUBLIC_NAME, "keep the TYPE_CHECKING imports in __init__.py and _ROOM_OF alike"


@pytest.mark.parametrize(("name", "room"), ROOM_OF_PUBLIC_NAME.items())
def test_a_public_name_is_its_rooms_own_object_and_shows_an_example(name: str, room: str) -> None:
    home = import_module(f"counterflow.{room}")
    assert hasattr(home, name), f"counterflow.{room} has no {name}: import it in the __init__.py of that room"
    value = getattr(counterflow, name)
    assert value is getattr(home, name)
    assert ">>>" in (value.__doc__ or ""), f"counterflow.{name} is public: its docstring needs an example (>>>)"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'counterflow' has no attribute 'dualpype'"):
        counterflow.dualpype  # noqa: B018


def test_the_runtime_offers_the_pipeline() -> None:
    runtime = import_module("counterflow.runtime")
    assert "Pipeline" in getattr(runtime, "__all__", ()), "put Pipeline into counterflow.runtime.__all__"
    assert ">>>" in (runtime.Pipeline.__doc__ or ""), "Pipeline is public: its docstring needs an example (>>>)"


# --- nothing that runs what it reads ------------------------------------------------------------------------

FORBIDDEN = {
    r"pickle(?!=False)": "pickle runs code from a file: write JSON, npz or safetensors",
    r"(?<![\w.])eval\(|builtins\.eval\b": "eval runs its input: parse it",
    r"weights_only\s*=\s*False": "weights_only=False unpickles anything: leave it at True",
}


@pytest.mark.parametrize(("pattern", "reason"), FORBIDDEN.items(), ids=["pickle", "eval", "weights_only"])
def test_no_file_runs_what_it_reads(pattern: str, reason: str) -> None:
    files = [f for f in SOURCE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    wrong = [
        f"{file.relative_to(SOURCE)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not wrong, f"{reason}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("import pickle", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("value = eval(text)", True),
        ("model.eval()", False),
        ("ast.literal_eval(text)", False),
        ("torch.load(path, weights_only = False)", True),
    ],
)
def test_the_patterns_catch_what_they_should(line: str, caught: bool) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN) is caught
