"""Metrics of the packaged model, where steps take time and results of several come together."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import mtpbatch
from mtpbatch import SamplingOptions
from mtpbatch.metrics import EngineMetrics

pytestmark = pytest.mark.anyio

PROMPTS = ["In the beginning", "def main(", "And it came to pass", "import os\n"]


async def test_metrics_say_what_completions_and_the_clock_say(demo_path: Path) -> None:
    registry = CollectorRegistry()

    def value(name: str, **labels: str) -> float:
        found = registry.get_sample_value(
            f"mtpbatch_{name}", {"model_name": "demo", "engine": "0", **labels}
        )
        assert found is not None
        return found

    params: SamplingOptions = {"max_tokens": 40, "ignore_eos": True, "speculation": 2}
    async with mtpbatch.Engine.open(demo_path, n_seq=4, n_ctx=512, n_threads=1) as engine:
        with EngineMetrics(engine, registry, model_name="demo"):
            begin = time.monotonic()
            done = [await engine.generate(PROMPTS[0], **params)]
            seconds = time.monotonic() - begin
            # Of its steps, those after the first token are what was waited for between tokens.
            waited = value("inter_token_latency_seconds_sum")
            steps = sum(value("step_time_seconds_total", part=p) for p in ("draft", "target"))
            assert steps - done[0].timings.first_token <= waited <= seconds
            assert value("inter_token_latency_seconds_count") == done[0].steps - 1

            done += await engine.generate_many(PROMPTS, **params)
            async with engine.stream(PROMPTS[1], **params) as deltas:
                done.append(await deltas)
            accepted = [
                sum(completion.accepted_by_depth[position] for completion in done)
                for position in range(2)
            ]
            assert accepted[0] > 0
            for position, count in enumerate(accepted):
                name = "spec_decode_num_accepted_tokens_per_pos_total"
                assert value(name, position=str(position)) == count
            assert value("spec_decode_num_accepted_tokens_total") == sum(accepted)
            assert value("spec_decode_num_draft_tokens_total") == sum(c.drafted for c in done)
            assert value("generation_tokens_total") == 40 * len(done)
            assert value("request_success_total", finished_reason="length") == len(done)
            decoded = sum(completion.steps - 1 for completion in done)
            assert value("inter_token_latency_seconds_count") == decoded
            first = sum(completion.timings.first_token for completion in done)
            assert value("time_to_first_token_seconds_sum") == pytest.approx(first)
            assert value("iteration_tokens_total_count") == value("steps_total")
