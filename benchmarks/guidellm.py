"""The same traffic measured by GuideLLM and by ``mtpbatch bench``, in turn, on the same server.

    python -m benchmarks.guidellm GUIDELLM [GGUF] [--url URL]

GUIDELLM is its program, which is best installed in an environment of its own, as it brings many
packages. Without a URL, ``mtpbatch serve`` is started with the model and without drafts. Both send
the same prompts, in the same order, in a closed loop, and want answers of the same length. Ratios
are ours / GuideLLM's, of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from benchmarks.command_line import add_threads, conditions, existing_file, in_one_line, parser
from benchmarks.report import table
from mtpbatch.loadtest.datasets import words


class Figures(Struct, frozen=True):
    """Means of one run: milliseconds, and tokens per second."""

    ttft: float
    itl: float
    throughput: float


class Traffic(Struct, frozen=True):
    """What both send."""

    prompts: list[str]
    concurrency: int
    tokens: int


def by_guidellm(program: Path, url: str, traffic: Traffic, folder: Path) -> Figures:
    data, out = folder / "guidellm.jsonl", folder / "guidellm.json"
    data.write_text(
        "".join(
            json.dumps({"prompt": prompt, "output_tokens_count": traffic.tokens}) + "\n"
            for prompt in traffic.prompts
        )
    )
    _run(
        program,
        "run",
        "--disable-console",
        f"--backend=kind=openai_http,target={url},request_format=/v1/completions",
        f"--profile=kind=concurrent,streams={traffic.concurrency}",
        f"--constraint=kind=max_requests,count={len(traffic.prompts)}",
        f"--data=kind=json_file,path={data}",
        f"--output=kind=json,path={out}",
    )
    [run] = json.loads(out.read_bytes())["benchmarks"]
    requests = run["requests"]
    if len(requests["successful"]) != len(traffic.prompts):
        raise RuntimeError(f"GuideLLM: {len(requests['successful'])} requests ended well")
    metrics = run["metrics"]
    return Figures(
        ttft=metrics["time_to_first_token_ms"]["successful"]["mean"],
        itl=metrics["inter_token_latency_ms"]["successful"]["mean"],
        throughput=len(traffic.prompts) * traffic.tokens / run["duration"],
    )


def by_mtpbatch(url: str, traffic: Traffic, folder: Path) -> Figures:
    data = folder / "mtpbatch.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": prompt, "output_tokens": traffic.tokens}) + "\n"
            for prompt in traffic.prompts
        )
    )
    _run(
        *(sys.executable, "-m", "mtpbatch", "bench", "--target", url, "--dataset", data),
        *("--concurrency", traffic.concurrency, "--requests", len(traffic.prompts)),
        *("--ignore-eos", "--out", folder),
    )
    [summary] = json.loads((folder / "result.json").read_bytes())["summaries"]
    return Figures(
        ttft=summary["ttft"]["mean"] * 1e3,
        itl=summary["tpot"]["mean"] * 1e3,  # GuideLLM's ITL is the mean of the requests' means
        throughput=summary["output_rate"],
    )


def _run(*command: object) -> None:
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{ended.stdout}{ended.stderr}")


@contextmanager
def served(model: Path | None, threads: int, n_seq: int) -> Iterator[str]:
    """``mtpbatch serve``, without drafts, so that every token is a chunk, whoever counts, and with
    no memory of prompts, which come again in each run."""
    command = [sys.executable, "-m", "mtpbatch", "serve", "--port", "0", "--speculation", "0"]
    command += ["--n-threads", str(threads), "--n-seq", str(n_seq), "--snapshot-memory", "0"]
    command += [] if model is None else ["--model", str(model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()  # it ends with the URL
            if not ready:
                raise RuntimeError("mtpbatch serve did not start")
            yield ready.split()[-1].removesuffix("/v1")
        finally:
            server.terminate()


def compare(args: argparse.Namespace, url: str) -> list[list[str]]:
    rng = random.Random(1)
    prompts = [words(rng, args.prompt_words) for _ in range(args.requests)]
    traffic = Traffic(prompts, args.concurrency, args.tokens)
    them: list[Figures] = []
    us: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            them.append(by_guidellm(args.guidellm.absolute(), url, traffic, Path(folder)))
            us.append(by_mtpbatch(url, traffic, Path(folder)))
    rows = []
    for name, label in (
        ("ttft", "TTFT, ms"),
        ("itl", "ITL of a request, ms"),
        ("throughput", "output tokens/s"),
    ):
        theirs, ours = ([getattr(each, name) for each in side] for side in (them, us))
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        rows.append(
            [
                label,
                ", ".join(f"{value:.1f}" for value in theirs),
                ", ".join(f"{value:.1f}" for value in ours),
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            ]
        )
    return rows


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("guidellm", type=existing_file, metavar="GUIDELLM")
    asked.add_argument("model", type=existing_file, nargs="?", metavar="GGUF")
    asked.add_argument("--url", help="of a server that runs already")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--concurrency", type=int, default=4)
    asked.add_argument("--requests", type=int, default=96)
    asked.add_argument("--prompt-words", type=int, default=60)
    asked.add_argument("--tokens", type=int, default=64, help="to generate per request")
    add_threads(asked, 1)
    args = asked.parse_args()
    version = subprocess.run(
        [args.guidellm, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    print(in_one_line(conditions() | {"GuideLLM": version}))
    print(
        f"\n{args.requests} requests, {args.concurrency} at once, of {args.tokens} tokens, "
        f"{args.rounds} rounds\n"
    )
    if args.url is not None:
        rows = compare(args, args.url)
    else:
        with served(args.model, args.threads, args.concurrency) as url:
            rows = compare(args, url)
    print(table(["means", "GuideLLM", "mtpbatch bench", "ratio"], rows))


if __name__ == "__main__":
    main()
