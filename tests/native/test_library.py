"""The border to libllama: only the version compiled against, only in the process that opened it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtpbatch._built_with import LLAMA_CPP_PYTHON


def run(
    script: str, *arguments: str | Path, path: Path | None = None, warnings: str = "error"
) -> str:
    """Run a script in a new interpreter; ``path`` comes first on its sys.path."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", prefix + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


CATCH_IMPORT_ERROR = """
import sys
try:
    import mtpbatch.native
except ImportError as error:
    assert type(error).__name__ == "LibraryMismatchError"
    assert "mtpbatch.native._ffi" not in sys.modules
    print(error)
"""


def test_another_version_of_llama_cpp_python_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "llama_cpp_python-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9.9\n"
    )
    assert run(CATCH_IMPORT_ERROR, path=tmp_path) == (
        f"mtpbatch was compiled against llama-cpp-python {LLAMA_CPP_PYTHON}, but 9.9.9 is "
        f'installed; run: pip install "llama-cpp-python=={LLAMA_CPP_PYTHON}"\n'
    )


def test_no_llama_cpp_python_is_refused() -> None:
    hide = """
import importlib.metadata, sys
find = importlib.metadata.distribution
def distribution(name):
    if name == "llama-cpp-python":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.distribution = distribution
"""
    assert run(hide + CATCH_IMPORT_ERROR) == (
        f"mtpbatch was compiled against llama-cpp-python {LLAMA_CPP_PYTHON}, but none is "
        f'installed; run: pip install "llama-cpp-python=={LLAMA_CPP_PYTHON}"\n'
    )


@pytest.mark.skipif(sys.platform != "linux", reason="builds a library as Linux has them")
def test_a_libllama_without_what_is_needed_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """As where other compilers built it, whose names of C++ differ: this one has none at all."""
    info = tmp_path / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {LLAMA_CPP_PYTHON}\n"
    )
    libraries = tmp_path / "llama_cpp" / "lib"
    libraries.mkdir(parents=True)
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    command = [compiler, "-shared", "-Wl,-soname,libllama.so.0", "-x", "c", os.devnull, "-o"]
    subprocess.run([*command, str(libraries / "libllama.so")], check=True)
    said = run(CATCH_IMPORT_ERROR, path=tmp_path)
    assert "undefined symbol: " in said
    assert said.endswith("--no-binary mtpbatch mtpbatch\n")


def test_importing_prints_nothing_and_starts_nothing() -> None:
    script = """
import os, signal, threading
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own threads are its business
signals = {s: signal.getsignal(s) for s in signal.valid_signals()}
import mtpbatch.native
assert threading.active_count() == 1
if os.path.exists("/proc/self/task"):
    assert len(os.listdir("/proc/self/task")) == 1
assert {s: signal.getsignal(s) for s in signal.valid_signals()} == signals
"""
    assert run(script) == ""


def test_loading_and_generating_print_nothing(tiny_path: Path) -> None:
    script = """
import sys
from mtpbatch.native import Batch, Context, Model, MtpSession
model = Model(sys.argv[1])
target = Context(model, n_ctx=32, n_rs_seq=2)
session = MtpSession(target, Context.mtp(target), 1, 2)
batch = Batch()
batch.add_sequence([40, 50], 0, 0)
target.decode(batch)
session.process(batch)
session.draft(0, 2, 60)
try:
    Model(__import__("os").devnull)
except Exception:
    pass
"""
    assert run(script, tiny_path) == ""


@pytest.mark.parametrize("first", ["llama_cpp", "mtpbatch"])
def test_it_shares_a_process_with_llama_cpp(tiny_path: Path, first: str) -> None:
    """Whichever is imported first, there is one libllama and both work."""
    script = """
import sys
def ours():
    from mtpbatch.native import Batch, Context, Model
    context = Context(Model(sys.argv[1]), n_ctx=32, kv_type="f32")
    batch = Batch()
    batch.add_sequence([40, 50], 0, 0)
    context.decode(batch)
    return context.logits(1).argmax()
def theirs():
    import llama_cpp
    how = dict(n_ctx=32, type_k=0, type_v=0, logits_all=True, verbose=False)
    model = llama_cpp.Llama(sys.argv[1], **how)
    model.eval([40, 50])
    return model.scores[1].argmax()
order = [ours, theirs] if sys.argv[2] == "mtpbatch" else [theirs, ours]
assert order[0]() == order[1]() == order[0]()
"""
    assert run(script, tiny_path, first, warnings="ignore") == ""


FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is the point
from mtpbatch.exceptions import WrongProcessError
from mtpbatch.native import Batch, Context, DraftRequest, Executor, Model, MtpSession
from mtpbatch.types import Plan
model = Model(sys.argv[1])
target = Context(model, n_ctx=32, n_rs_seq=2, n_threads=2)
draft = Context.mtp(target)
session = MtpSession(target, draft, 1, 2)
batch = Batch()
batch.add_sequence([40, 50], 0, 0)
target.decode(batch)
executor = Executor(target, session)

uses = [
    lambda: model.tokenize("a"), lambda: model.token_bytes(5), lambda: Context(model),
    lambda: target.decode(batch), lambda: target.logits(1), lambda: target.length(0),
    lambda: target.truncate(0, 0), lambda: Context.mtp(target),
    lambda: session.process(batch), lambda: session.draft(0, 2, 60), lambda: session.statistics(),
    lambda: session.draft_many([DraftRequest(0, 2, 60)]), lambda: session.accept(0, 0),
    lambda: session.begin(0, [40, 50]), lambda: MtpSession(target, draft, 1, 2),
    lambda: executor.exchange(None, wait=False), lambda: Executor(target, session),
]

def child():
    signal.alarm(30)  # a lock held by a thread that does not exist here would hang it
    refused = 0
    for use in uses:
        try:
            use()
        except WrongProcessError as error:
            assert str(os.getppid()) in str(error)
            refused += 1
    for handle in (executor, session, draft, target, model):
        handle.close()
    return 40 + (refused == len(uses))

# Fork while another thread is in a call: its lock stays locked in the child for ever.
with_lock, go_on = threading.Event(), threading.Event()
def hold():
    with target._lock:
        with_lock.set()
        go_on.wait()
thread = threading.Thread(target=hold)
thread.start()
with_lock.wait()
pid = os.fork()
if pid == 0:
    code = 1
    try:
        code = child()
    finally:
        os._exit(code)
_, status = os.waitpid(pid, 0)
go_on.set()
thread.join()
executor.close()
target.truncate(0, 0)
target.decode(batch)  # the parent is unharmed
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_that_it_cannot_use_its_parents(tiny_path: Path) -> None:
    assert run(FORK, tiny_path) == "41\n"
