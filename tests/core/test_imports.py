"""Imports go one way, and importing the library touches nothing of the app's."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest

import mtpbatch

PACKAGE = Path(mtpbatch.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "exceptions": set(),
    "in_words": set(),
    "types": {"in_words", "exceptions"},
    "options": {"types"},
    "text": set(),
    "costs": {"types"},
    "speculation": {"costs", "types", "exceptions"},
    "sequence": {"speculation", "text", "types", "exceptions"},
    "waiting": {"sequence", "types", "exceptions"},
    "prefix": {"exceptions"},
    "timeouts": {"types", "exceptions"},
    "backlog": {"sequence", "types", "exceptions"},
    "memory": {"sequence", "types", "exceptions"},
    "scheduler": {
        *("memory", "prefix", "speculation", "waiting"),
        *("sequence", "types", "exceptions"),
    },
    "backend": {"types", "exceptions"},
    "_loops": set(),
    "_log": {"exceptions"},
    "_slices": {"exceptions"},
    "tokenizing": {"backend", "_loops", "_slices", "types", "exceptions"},
    "_process": {"exceptions"},
    "generation": {"scheduler", "_loops", "_process", "types", "exceptions"},
    "chat/messages": {"types", "exceptions"},
    "chat/answer": {"chat", "types"},
    "chat/template": {"chat", "exceptions"},
    "chat/generation": {"chat", "generation", "types"},
    "embedding": {"backend", "_loops", "types", "exceptions"},
    "structured/source": {"in_words", "types", "exceptions"},
    "structured/library": {"exceptions"},
    "structured/trial": {"structured", "_process", "types", "exceptions"},
    "structured/trial_process": set(),  # a program of its own
    "machine": set(),
    "_llama_cpp": {"exceptions", "_built_with"},  # the latter is written by the build
    "loading": {"_loops", "exceptions"},
    "gate": {"_process", "exceptions"},
    "restarts": set(),
    "isolated/messages": {"types", "exceptions"},
    "isolated/channel": {"isolated", "exceptions"},
    "isolated/process": {"isolated", "_process", "exceptions"},
    "isolated/backend": {"isolated", "backend", "_process", "types", "exceptions"},
    "isolated/__main__": {"isolated", "native", "types"},  # the program of the other process
    "intake": {
        *("backend", "backlog", "gate", "generation", "scheduler", "sequence", "speculation"),
        *("structured", "text", "timeouts", "tokenizing", "_loops", "_log", "types", "exceptions"),
    },
    "watching": {"sequence", "_log", "types", "exceptions"},
    "engine": {
        *("backend", "chat", "embedding", "gate", "generation", "intake", "loading", "scheduler"),
        *(
            "options",
            "restarts",
            "speculation",
            "tokenizing",
            "watching",
            "_loops",
            "_log",
            "types",
        ),
        "exceptions",
        *("isolated", "native"),  # inside open() only
    },
    "probing/messages": set(),
    "probing/__init__": {"probing", "_process", "types", "exceptions"},
    "probing/__main__": {"probing", "engine", "exceptions"},
    "metrics": {"engine", "watching", "types", "exceptions"},
    "tracing": {"watching", "types", "exceptions"},
    "testing/scripted": {"backend", "engine", "_loops", "types", "exceptions"},
    "testing/workload": {"types", "exceptions"},
    "testing/simulated": {"testing", "speculation", "types", "exceptions"},
    "loadtest/units": {"loadtest", "in_words", "exceptions"},
    "loadtest/lengths": {"testing", "in_words", "exceptions"},
    "loadtest/arrivals": {"exceptions"},
    "loadtest/traces": {"exceptions"},
    "loadtest/datasets": {"loadtest", "testing", "exceptions"},
    "loadtest/answer": set(),
    "loadtest/targets": {"loadtest", "engine", "generation", "types", "exceptions"},
    "loadtest/openai_target": {"loadtest", "in_words", "exceptions"},
    "loadtest/overhead": {"loadtest"},
    "loadtest/steady": {"loadtest"},
    "loadtest/driver": {"loadtest"},
    "loadtest/sweep": set(),
    "loadtest/settings": {"loadtest", "testing", "in_words", "exceptions"},
    "loadtest/environment": {"machine"},
    "loadtest/progress": {"loadtest"},
    "loadtest/bench": {"loadtest", "exceptions"},
    "loadtest/mock": {"loadtest"},
    "loadtest/records": set(),
    "loadtest/summary": {"loadtest"},
    "loadtest/report/comparison": {"loadtest"},
    "loadtest/report/plots": set(),
    "loadtest/report/charts": {"loadtest"},
    "loadtest/report/tables": {"loadtest"},
    "loadtest/report/html": {"loadtest"},
    "loadtest/report/side_by_side": {"loadtest", "exceptions"},
    "loadtest/results": {"loadtest", "exceptions"},
    "testing/simulation": {
        "testing",
        "scheduler",
        "sequence",
        "speculation",
        "text",
        "types",
        "exceptions",
    },
}

MAY_IMPORT |= {
    "server/config": set(),
    "server/errors": {"restarts", "exceptions"},
    "server/limits": {"server", "types", "exceptions"},
    "server/protocol": {"chat", "types", "exceptions"},
    "server/openapi": {"server"},
    "server/endpoint": {"server", "engine", "_log", "exceptions"},
    "server/generating": {"server", "generation", "types", "exceptions"},
    "server/tools": {"server", "chat", "exceptions"},
    "server/completions": {"server", "generation", "types", "exceptions"},
    "server/chat": {"server", "chat", "generation", "types", "exceptions"},
    "server/embeddings": {"server", "exceptions"},
    "server/app": {"server", "engine", "metrics", "tracing", "_log", "types", "exceptions"},
    "server/run": {"server", "engine", "_log", "types", "exceptions"},
    "server/page/feed": {"engine", "types", "watching", "exceptions"},
    "server/page/web": {"server", "engine"},
}

MAY_IMPORT |= {
    "scaleout/passing": set(),
    "scaleout/routing": {"scaleout"},
    "scaleout/ingress": {"scaleout", "server", "_log"},
    "scaleout/replica": {
        *("scaleout", "server", "chat", "engine", "tokenizing", "_log", "types", "exceptions"),
    },
    "scaleout/application": {"scaleout", "server", "types"},
}

IMPURE = {
    *("anyio", "asyncio", "cffi", "ctypes", "datetime", "llama_cpp", "threading", "time", "trio"),
    "uvloop",
}

# Where a thread sleeps or the calendar is asked, and why.
WALL_CLOCK = {
    "_slices.py": {"time.sleep": "so that another thread gets the GIL, for 50 microseconds"},
    "chat/template.py": {"datetime.datetime.now": "templates ask for today's date"},
    "loadtest/bench.py": {"datetime.datetime.now": "the report says when it was measured"},
    "server/app.py": {"time.time": "OpenAI's answers say when the model was created"},
    "server/endpoint.py": {"time.time": "OpenAI's answers say when they were created"},
    "tracing.py": {"time.time_ns": "spans begin and end at times of day"},
}

# Tests that sleep or ask the calendar, and why.
WALL_CLOCK_IN_TESTS = {
    "chat/test_template.py": {"datetime.datetime.now": "the date that the template has to give"},
    "core/test_tokenizing.py": {"time.sleep": "in place of the code's, as short"},
    "loadtest/test_driver.py": {"anyio.sleep": "on a clock that jumps to whatever happens next"},
}


def imports(module: str) -> set[str]:
    """What a module imports at run time: whole names, "mtpbatch.types" and "time" alike."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            assert node.module is not None
            if node.module == "mtpbatch":
                names |= {f"mtpbatch.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def own_imports(module: str) -> set[str]:
    found = {name.split(".")[1] for name in imports(module) if name.startswith("mtpbatch.")}
    return {name for name in found if not name.startswith("_") or (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_its_place() -> None:
    """But for those that only put others together, the native layer, which has its own test, and
    what the build writes."""
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        free = module.startswith(("cli/", "native/", "_built_with")) or path.stem.startswith("__")
        assert free or module in MAY_IMPORT, module


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    assert own_imports(module) <= MAY_IMPORT[module]


def test_every_module_of_the_native_layer_knows_nothing_of_requests() -> None:
    for path in (PACKAGE / "native").glob("*.py"):
        above = own_imports(f"native/{path.stem}") & {"engine", "generation", "scheduler"}
        assert not above, f"native/{path.name} imports {above}"


def test_the_apps_side_of_an_isolated_model_loads_no_native_code() -> None:
    program = """
import sys
import mtpbatch.isolated
assert not {"mtpbatch.native", "llama_cpp", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_nothing_the_scheduler_imports_knows_time_threads_loops_or_native_code() -> None:
    closure, todo = set(), ["scheduler"]
    while todo:
        module = todo.pop()
        if module not in closure:
            closure.add(module)
            todo += own_imports(module)
    assert closure == {
        *("scheduler", "memory", "prefix", "waiting", "sequence", "speculation", "costs"),
        *("text", "types", "in_words", "exceptions"),
    }
    for module in (*closure, "restarts"):
        outside = {name.split(".")[0] for name in imports(module)}
        assert not outside & IMPURE


def full_names(tree: ast.AST) -> set[str]:
    """What a program names of modules it imports, in full, whatever it calls them.

    A call with the argument 0 is left out: such a sleep lets others go on.
    """
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    at_once = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and [ast.unparse(each) for each in node.args] == ["0"]
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in at_once:
            first, dot, rest = ast.unparse(node).partition(".")
            names.add(modules.get(first, first) + dot + rest)
    return names


def wall_clock(folder: Path, *, also: Set[str] = frozenset()) -> dict[str, set[str]]:
    """By file: where a thread sleeps or the calendar is asked."""
    asked = also | {
        *("time.sleep", "time.time", "time.time_ns", "time.localtime", "time.gmtime"),
        *("time.ctime", "time.strftime"),
        *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today"),
        "datetime.date.today",
    }
    found = {
        path.relative_to(folder).as_posix(): full_names(ast.parse(path.read_text("utf-8"))) & asked
        for path in folder.rglob("*.py")
    }
    return {name: names for name, names in found.items() if names}


def test_nothing_sleeps_or_asks_the_calendar_but_for_a_reason() -> None:
    listed = {name: set(reasons) for name, reasons in WALL_CLOCK.items()}
    assert wall_clock(PACKAGE) == listed


def test_no_test_sleeps_but_for_a_reason() -> None:
    sleeps = {"anyio.sleep", "asyncio.sleep", "trio.sleep"}
    listed = {name: set(reasons) for name, reasons in WALL_CLOCK_IN_TESTS.items()}
    assert wall_clock(Path(__file__).parents[1], also=sleeps) == listed


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("import time\ntime.sleep(1)", {"time.sleep"}),
        ("import time as clock\nnow = clock.time", {"time.time"}),
        ("from asyncio import sleep as nap\nnap(0.1)", {"asyncio.sleep"}),
        ("from datetime import datetime\ndatetime.now()", {"datetime.datetime.now"}),
        ("import asyncio\nasyncio.sleep(0)", set()),
        ("import time\ntime.monotonic()", set()),
    ],
)
def test_sleeps_and_clocks_are_found_whatever_they_are_called(
    tmp_path: Path, program: str, names: set[str]
) -> None:
    (tmp_path / "program.py").write_text(program)
    found = wall_clock(tmp_path, also={"asyncio.sleep"})
    assert found == ({"program.py": names} if names else {})


def test_importing_the_library_touches_nothing_of_the_apps() -> None:
    program = """
import asyncio, logging, signal, sys, threading
policy = asyncio.get_event_loop_policy() if sys.version_info < (3, 14) else None
signals = [signal.getsignal(s) for s in signal.valid_signals()]
import mtpbatch, mtpbatch.testing
assert threading.active_count() == 1
assert signals == [signal.getsignal(s) for s in signal.valid_signals()]
if policy: assert asyncio.get_event_loop_policy() is policy
assert logging.getLogger().handlers == []
(handler,) = logging.getLogger("mtpbatch").handlers
assert type(handler) is logging.NullHandler
assert logging.getLogger("mtpbatch").level == logging.NOTSET
import structlog
assert not structlog.is_configured()
extras = {"prometheus_client", "opentelemetry", "starlette", "uvicorn", "ray"}
heavy = {"trio", "uvloop", "llama_cpp", "numpy"}
loaded = {name.split(".")[0] for name in sys.modules} & (heavy | extras)
assert not loaded, loaded
assert not {"mtpbatch.native", "mtpbatch.loadtest"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [
        ("metrics", "prometheus_client", "server"),
        ("server", "starlette", "server"),
        ("tracing", "opentelemetry", "otel"),
        ("scaleout", "ray", "ray"),
    ],
)
def test_a_missing_extra_is_named(module: str, needs: str, extra: str) -> None:
    program = f"import sys; sys.modules[{needs!r}] = None; import mtpbatch.{module}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert f"pip install 'mtpbatch[{extra}]'" in last
