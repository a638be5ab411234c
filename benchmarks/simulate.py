"""What engines would do under a load: studies with the simulator of ``mtpbatch.testing``.

    python -m benchmarks.simulate policies     # sequences and draft depths, on bursty traffic
    python -m benchmarks.simulate texts        # the adaptive depth beside fixed ones, text by text
    python -m benchmarks.simulate changes      # draft depths while the number of clients changes
    python -m benchmarks.simulate replicas     # several engines at a thousand requests per second
    python -m benchmarks.simulate million      # a million requests, for the simulator's own speed

Prints tables, and with ``--plots FOLDER`` writes SVG files there (``pip install '.[bench]'``). What
a step costs is given as four times in milliseconds: of a forward pass and of each of its tokens, of
a draft decode and of each of its tokens. The default of the first three studies is about the wide
model on two CPUs, that of the others an attention-only model on some GPU: an example, not measured.

No model runs, and the figures are the same on every machine, but for those of ``million``.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command_line
from benchmarks.report import table
from mtpbatch.testing import (
    ClosedLoop,
    Drafts,
    LogNormal,
    OpenLoop,
    Profile,
    RequestKind,
    SimulationReport,
    StepCost,
    Summary,
    Uniform,
    ramp,
    simulate,
    square_wave,
    steady,
)
from mtpbatch.types import ModelFacts, Speculation

_WIDE = (5.5, 1.5, 0.7, 0.15)
_N_CTX = 4096
_PROMPT = LogNormal(median=32, sigma=1.0, most=2000)
_ANSWER = LogNormal(median=64, sigma=0.8, most=1000)
_KINDS = [  # in equal parts: texts that repeat themselves, prose, and drafts that are poor
    RequestKind(prompt=_PROMPT, answer=_ANSWER, drafts=Drafts(acceptance=acceptance))
    for acceptance in (0.9, 0.7, 0.3)
]


def facts(n_seq: int, *, recurrent: bool) -> ModelFacts:
    return ModelFacts(
        n_ctx=_N_CTX,
        n_seq=n_seq,
        n_batch=2048,
        n_draft_max=3,
        n_vocab=32_000,
        eog_token_ids=frozenset(),
        n_cells=n_seq * _N_CTX,
        n_ubatch=512,
        recurrent=recurrent,
        truncates=not recurrent,
    )


def step_cost(milliseconds: Sequence[float]) -> StepCost:
    return StepCost(*(value / 1000 for value in milliseconds))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def _spread(summary: Summary) -> str:
    """Median and 99th percentile, in milliseconds."""
    return f"{_ms(summary.p50)} · {_ms(summary.p99)}"


# -------------------------------------------------------------------------------- studies


def policies(options: argparse.Namespace) -> None:
    """Sequences and draft depths, on bursty traffic."""
    cost = step_cost(options.cost)
    totals: dict[str, list[float]] = {}
    for rate in options.rates:
        rows = []
        for n_seq in options.sequences:
            for depth in options.depths:
                report = simulate(
                    OpenLoop(steady(rate), options.variation),
                    _KINDS,
                    facts(n_seq, recurrent=options.recurrent),
                    cost,
                    n_requests=options.requests,
                    speculation=depth,
                )
                totals.setdefault(f"{n_seq} sequences, depth {depth}", []).append(report.total.mean)
                rows.append([str(n_seq), str(depth), *_columns(report)])
        print(f"\n{rate:g} requests per second:\n")
        print(table(["sequences", "depth", *_HEAD], rows))
    _plot(
        options.plots,
        "policies",
        ("requests per second", "mean seconds from submission to the end"),
        {name: (options.rates, times) for name, times in totals.items()},
    )


_HEAD = (
    *("tokens/s", "busy", "queued, ms: p50 · p99", "first token, ms", "per token, ms"),
    "whole request, ms",
)


def _columns(report: SimulationReport) -> list[str]:
    return [
        f"{report.throughput:.0f}",
        f"{report.utilisation:.0%}",
        _spread(report.queued),
        _spread(report.first_token),
        f"{1000 * report.per_token.p50:.1f} · {1000 * report.per_token.p99:.1f}",
        _spread(report.total),
    ]


def texts(options: argparse.Namespace) -> None:
    """The adaptive depth over the best fixed one, by text and clients, from the first step on."""
    drafts = {
        "repetitive": [Drafts(0.97, 0.3, 0.98)],
        "prose": [Drafts(0.88, 0.5, 0.93)],
        "sampled": [Drafts(0.5, 0.4, 0.85)],
        "poor": [Drafts(0.06, 0.2, 0.8)],
    }
    drafts["mixed"] = [one for [one] in drafts.values()]
    prompt, answer = Uniform(35, 55), Uniform(32, 96)

    def speed(name: str, clients: int, depth: Speculation) -> float:
        return simulate(
            ClosedLoop(steady(clients)),
            [RequestKind(prompt=prompt, answer=answer, drafts=one) for one in drafts[name]],
            facts(32, recurrent=options.recurrent),
            step_cost(options.cost),
            n_requests=options.turns * max(clients, 4),
            speculation=depth,
        ).throughput

    rows = []
    for name in drafts:
        cells = []
        for clients in options.clients:
            best = max(speed(name, clients, d) for d in options.depths if d != "auto")
            cells.append(f"{speed(name, clients, 'auto') / best:.3f}")
        rows.append([name, *cells])
    print(table(["text", *(f"{clients} clients" for clients in options.clients)], rows))


def changes(options: argparse.Namespace) -> None:
    """Draft depths while the number of clients changes."""
    cost = step_cost(options.cost)
    loads: dict[str, Profile] = {
        "ramp": ramp(1, 32, options.seconds),
        "square_wave": square_wave(2, 24, options.seconds / 4),
    }
    rows: dict[Speculation, list[str]] = {depth: [] for depth in options.depths}
    for name, load in loads.items():
        speeds = {}
        for depth in options.depths:
            report = simulate(
                ClosedLoop(load),
                _KINDS,
                facts(32, recurrent=options.recurrent),
                cost,
                until=options.seconds,
                speculation=depth,
                sample_every=options.seconds / 60,
            )
            samples = [sample for sample in report.samples if sample.time <= options.seconds]
            rows[depth].append(f"{sum(s.tokens for s in samples) / options.seconds:.1f}")
            times = [sample.time for sample in samples]
            every = options.seconds / 60
            speeds[f"depth {depth}"] = (times, [sample.tokens / every for sample in samples])
        _plot(options.plots, name, ("seconds", "tokens per second"), speeds)
    head = ["depth", *(f"{name.replace('_', ' ')}, tokens/s" for name in loads)]
    print(table(head, [[str(depth), *cells] for depth, cells in rows.items()]))


def replicas(options: argparse.Namespace) -> None:
    """Several engines, each request to the one that has the fewest."""
    cost = step_cost(options.cost)
    waits: dict[str, list[float]] = {}
    rows = []
    for depth in options.depths:
        for n_engines in options.engines:
            report = simulate(
                OpenLoop(steady(options.rate), options.variation),
                _KINDS,
                facts(options.sequences, recurrent=options.recurrent),
                cost,
                n_requests=options.requests,
                speculation=depth,
                n_engines=n_engines,
            )
            waits.setdefault(f"depth {depth}", []).append(report.first_token.p99)
            most = max(sample.waiting for sample in report.samples)
            rows.append([str(depth), str(n_engines), *_columns(report), str(most)])
    print(table(["depth", "engines", *_HEAD, "most waiting"], rows))
    _plot(
        options.plots,
        "replicas",
        ("engines", "first token, p99, seconds"),
        {name: (options.engines, times) for name, times in waits.items()},
    )


def million(options: argparse.Namespace) -> None:
    """A million requests."""
    print(f"{command_line.in_one_line(command_line.conditions())}\n")
    rows = []
    for depth in options.depths:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        report = simulate(
            OpenLoop(steady(options.rate), options.variation),
            _KINDS,
            facts(options.sequences, recurrent=options.recurrent),
            step_cost(options.cost),
            n_requests=options.requests,
            speculation=depth,
            sample_every=60.0,
        )
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        rows.append(
            [
                str(depth),
                f"{report.requests:,}",
                f"{report.generated_tokens:,}",
                f"{report.steps:,}",
                f"{report.seconds / 3600:.1f}",
                f"{report.utilisation:.0%}",
                f"{seconds:.0f}",
                f"{cpu:.0f}",
            ]
        )
    head = ["depth", "requests", "tokens", "steps", "virtual hours", "busy", "took, s", "CPU, s"]
    print(table(head, rows))


def _plot(
    folder: Path | None,
    name: str,
    axes: tuple[str, str],
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    if folder is None:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mtpbatch"  # the same figures give the same file
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, (x, y) in lines.items():
        plot.plot(x, y, label=label, marker="o" if len(x) < 20 else "", linewidth=1.2)
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    plot.set_ylim(bottom=0)
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


# --------------------------------------------------------------------------- command line


def _depth(text: str) -> Speculation:
    return "auto" if text == "auto" else int(text)


def _svg_folder(text: str) -> Path:
    """What draws must be there before anything is simulated."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("there is no matplotlib: pip install '.[bench]'")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(__doc__)
    studies = parser.add_subparsers(required=True, metavar="STUDY")

    def study(
        run: Callable[[argparse.Namespace], None],
        *,
        cost: tuple[float, ...] = _WIDE,
        recurrent: bool = False,
        depths: Sequence[Speculation] = (0, 1, 3, "auto"),
    ) -> argparse.ArgumentParser:
        added = studies.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument(
            "--cost",
            type=float,
            nargs=4,
            default=cost,
            metavar=("PASS", "TOKEN", "DRAFT_DECODE", "DRAFT_TOKEN"),
            help="what a step costs, in milliseconds",
        )
        added.add_argument(
            "--recurrent",
            action=argparse.BooleanOptionalAction,
            default=recurrent,
            help="whether drafts of different lengths are different passes",
        )
        added.add_argument(
            "--depths",
            type=_depth,
            nargs="+",
            default=depths,
            metavar="DEPTH",
            help='fixed draft depths, and "auto"',
        )
        if run not in (million, texts):
            added.add_argument("--plots", type=_svg_folder, metavar="FOLDER", help="for SVG files")
        return added

    several_counts: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    variation: dict[str, Any] = {"type": float, "help": "of the gaps: 1 at random, more in bursts"}
    requests: dict[str, Any] = {"type": int, "help": "of each run"}

    bursty = study(policies, recurrent=True)
    bursty.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="requests per second"
    )
    bursty.add_argument("--variation", default=3.0, **variation)
    bursty.add_argument("--sequences", default=[4, 8, 16], help="of the engine", **several_counts)
    bursty.add_argument("--requests", default=2000, **requests)

    by_text = study(texts, recurrent=True, depths=(0, 1, 2, 3, "auto"))
    by_text.add_argument(
        "--clients", default=[1, 2, 4, 8, 16, 32], help="at once", **several_counts
    )
    by_text.add_argument("--turns", type=int, default=10, help="requests of each client")

    changing = study(changes, recurrent=True)
    changing.add_argument("--seconds", type=float, default=1200.0, help="of the virtual clock")

    several = study(replicas, cost=(12.0, 0.05, 1.0, 0.02))
    several.add_argument("--rate", type=float, default=1000.0, help="requests per second")
    several.add_argument("--variation", default=1.0, **variation)
    several.add_argument("--engines", default=[16, 20, 24], help="how many", **several_counts)
    several.add_argument("--sequences", type=int, default=64, help="of each engine")
    several.add_argument("--requests", default=20_000, **requests)

    speed = study(million, cost=(4.0, 0.2, 0.4, 0.02), depths=(0, 3, "auto"))
    speed.add_argument("--rate", type=float, default=14.0, help="requests per second")
    speed.add_argument("--variation", default=1.0, **variation)
    speed.add_argument("--sequences", type=int, default=16, help="of the engine")
    speed.add_argument("--requests", default=1_000_000, **requests)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
