"""mtpbatch beside llama-server, and beside what native calls alone allow.

    python tools/widen_model.py wide.gguf          # a model whose cost is like a real one's
    python -m benchmarks.side_by_side src/mtpbatch/models/demo.gguf wide.gguf

llama-server comes from the llama.cpp source that the installed llama-cpp-python was compiled from,
with the same flags; the first run builds it (--llama-server gives another). All sides get the same
GGUF, prompts and threads, decode greedily and serve a closed loop: each client sends its next
request when its last one ends. In every round each variant runs once, A B A B, in a process that
exists only then; a machine whose speed drifts so hurts them alike. Ratios are taken within a
round. What counts is the median over rounds, with the least and the greatest beside it.

Keep the machine quiet: whatever else runs makes every figure worthless.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import llama_cpp
import msgspec

from benchmarks import command_line, engine_process, llama_server, native_ideal, report
from benchmarks.report import Record, Side, Variant
from benchmarks.workload import N_CTX, measure, peak_memory

_ROOT = Path(__file__).resolve().parent.parent


class Bench:
    """The programs and options of a run; measures one variant at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._concurrency: list[int] = options.concurrency
        self._log = options.build_dir / "last.log"
        self._ideal = native_ideal.build(options.build_dir)
        self.server = options.llama_server or llama_server.build(options.build_dir)

    def variants(self) -> list[Variant]:
        """In the order of a round: at each depth all sides in turn, then mtpbatch's own choice."""
        variants = []
        for depth in self._options.depths:
            variants += [Variant(Side.LLAMA_SERVER, depth, kv) for kv in self._options.server_kv]
            for side in (Side.MTPBATCH, Side.IDEAL):
                variants += [Variant(side, depth, kv) for kv in report.KV]
        if max(self._options.depths) > 0:
            variants += [Variant(Side.MTPBATCH, report.ADAPTIVE, kv) for kv in report.KV]
        return variants

    def measure(self, model: Path, variant: Variant, turn: int) -> Record:
        run = {
            Side.LLAMA_SERVER: self._measure_server,
            Side.MTPBATCH: self._measure_engine,
            Side.IDEAL: self._measure_ideal,
        }[variant.side]
        return run(model, variant, turn)

    def _measure_server(self, model: Path, variant: Variant, turn: int) -> Record:
        with llama_server.running(
            self.server,
            model,
            n_seq=max(self._concurrency),
            depth=variant.fixed_depth,
            kv=variant.kv,
            threads=self._options.threads,
            log=self._log,
        ) as server:
            measured = anyio.run(
                measure,
                server.generate,
                server.first_token,
                self._concurrency,
                self._options.tokens,
            )
            memory = peak_memory(server.pid)
        return Record(variant, turn, measured.loads, server.start_up, memory, measured.first_token)

    def _measure_engine(self, model: Path, variant: Variant, turn: int) -> Record:
        task = engine_process.Task(
            str(model),
            variant.depth,
            max(self._options.depths) if variant.depth == report.ADAPTIVE else variant.fixed_depth,
            variant.kv == "unified",
            self._options.threads,
            self._concurrency,
            self._options.tokens,
        )
        argument = msgspec.json.encode(task).decode()
        command = [sys.executable, "-m", engine_process.__name__, argument]
        begin = time.perf_counter()
        with (
            self._log.open("wb") as log,
            subprocess.Popen(
                command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
        ):
            assert process.stdout is not None
            process.stdout.readline()  # the engine is open
            start_up = time.perf_counter() - begin
            written = process.stdout.read()
        if process.returncode != 0:
            raise RuntimeError(
                f"mtpbatch ended with {process.returncode}: {shlex.join(command)}\n"
                f"{self._log.read_text(errors='replace')[-4000:]}"
            )
        outcome = msgspec.json.decode(written, type=engine_process.Outcome)
        measured = outcome.measured
        return Record(
            variant, turn, measured.loads, start_up, outcome.peak_memory, measured.first_token
        )

    def _measure_ideal(self, model: Path, variant: Variant, turn: int) -> Record:
        loads = {}
        for clients in self._concurrency:
            outcome = native_ideal.run(
                self._ideal,
                model,
                n_seq=clients,
                depth=variant.fixed_depth,
                kv=variant.kv,
                threads=self._options.threads,
                tokens=self._options.tokens,
            )
            loads[clients] = outcome.load
        return Record(variant, turn, loads)


def measure_model(bench: Bench, model: Path, rounds: int) -> Iterator[list[Record]]:
    """The records so far, after every round."""
    with model.open("rb") as file:  # so that nobody's start-up has to read it from the disk
        while file.read(1 << 24):
            pass
    records = []
    for turn in range(1, rounds + 1):
        print(f"{model.name}, round {turn} of {rounds}", file=sys.stderr)
        for variant in bench.variants():
            record = bench.measure(model, variant, turn)
            records.append(record)
            speeds = "  ".join(f"{c}: {load.speed:7.1f}" for c, load in record.loads.items())
            print(f"  {variant.label:<40} {speeds} tokens/s", file=sys.stderr)
        yield records


def all_conditions(options: argparse.Namespace, server: Path) -> dict[str, str]:
    """Those of every benchmark, and what makes the two sides comparable."""
    version = subprocess.run([server, "--version"], capture_output=True, text=True)
    ours = llama_cpp.llama_print_system_info().decode().strip()
    theirs = llama_server.features(server)
    if ours != theirs:
        print(f"Compiled differently!\n  ours   {ours}\n  theirs {theirs}", file=sys.stderr)
    return {
        "command": "python -m benchmarks.side_by_side " + shlex.join(sys.argv[1:]),
        **command_line.conditions(),
        "threads": str(options.threads),
        "llama-server": (version.stdout + version.stderr).splitlines()[0],
        "compiled with": ours if ours == theirs else f"{ours}; llama-server: {theirs}",
        "work": f"{options.tokens} tokens a request, {options.rounds} rounds, greedy, sequences of "
        f"{N_CTX} tokens; llama-server and mtpbatch have {max(options.concurrency)} of them, the "
        f"ideal as many as there are clients",
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    command_line.add_work(parser, rounds=5, concurrency=[1, 4, 16])
    command_line.add_threads(parser)
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3],
        metavar="N",
        help="tokens drafted per step, on all sides; 0 is without MTP",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a try-out: --rounds 1 --tokens 16, whatever is said"
    )
    parser.add_argument(
        "--server-kv",
        choices=report.KV,
        nargs="+",
        default=report.KV,
        help="llama-server's KV caches; its own default for a given number of slots is split",
    )
    parser.add_argument(
        "--llama-server",
        type=command_line.existing_file,
        metavar="PATH",
        help="the program to compare with, instead of building one",
    )
    parser.add_argument(
        "--build-dir",
        type=Path,
        default=Path.home() / ".cache" / "mtpbatch-bench",
        help="where programs are built, and kept for the next time",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build", "side-by-side"),
        metavar="STEM",
        help="where STEM.json and STEM.md are written",
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 1, 16

    options.output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    facts = all_conditions(options, bench.server)
    records = {}
    for model in options.models:
        for so_far in measure_model(bench, model.resolve(), options.rounds):
            records[model.name] = so_far
            # Now: a run that is broken off keeps what it has.
            result = msgspec.json.encode({"conditions": facts, "records": records})
            options.output.with_suffix(".json").write_bytes(msgspec.json.format(result, indent=1))
            text = report.markdown(facts, records)
            options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
