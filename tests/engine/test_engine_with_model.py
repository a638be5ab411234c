"""The engine on the packaged model, on each event loop: the whole path, and every way to end."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import mtpbatch
import random_model
from mtpbatch.types import Isolation
from patience import until

pytestmark = pytest.mark.anyio

PROMPTS = ["In the beginning", "def main(", "And it came to pass", "import os\n"]


@pytest.fixture
async def engine(demo_path: Path, isolation: Isolation) -> AsyncIterator[mtpbatch.Engine]:
    async with mtpbatch.Engine.open(
        demo_path, n_seq=4, n_ctx=512, n_batch=32, n_threads=1, isolation=isolation
    ) as engine:
        yield engine
        assert engine.stats().running == 0, "a test left a request running"
        assert engine.stats().free_sequences == 4


async def test_generate_many_drafts_for_all_sequences_at_once(engine: mtpbatch.Engine) -> None:
    completions = await engine.generate_many(PROMPTS, max_tokens=40, ignore_eos=True, speculation=3)
    for prompt, done in zip(PROMPTS, completions, strict=True):
        assert done.finish_reason == "length"
        assert len(done.token_ids) == done.usage.completion_tokens == 40
        assert done.prompt_token_ids == tuple(await engine.tokenize(prompt))
        assert done.text == await engine.detokenize(done.token_ids)
        assert done.accepted > 0
        assert done.accepted + done.steps == 40
        assert done.timings.total >= done.timings.first_token > 0
    stats = engine.stats()
    assert stats.mtp
    assert stats.generated_tokens == 160
    assert stats.accepted == sum(done.accepted for done in completions)


async def test_a_stream_gives_the_text_of_its_completion_in_pieces(engine: mtpbatch.Engine) -> None:
    async with engine.stream("In the beginning", max_tokens=60, ignore_eos=True) as deltas:
        seen = [delta async for delta in deltas]
    assert deltas.completion is not None
    assert "".join(delta.text for delta in seen) == deltas.completion.text
    assert tuple(t for delta in seen for t in delta.token_ids) == deltas.completion.token_ids
    assert sum(delta.n_accepted for delta in seen) == deltas.completion.accepted
    assert [delta.finish_reason for delta in seen][-1] == "length"


async def test_a_stop_text_ends_the_request_and_never_shows(engine: mtpbatch.Engine) -> None:
    whole = await engine.generate("And it came to pass", max_tokens=60, ignore_eos=True)
    stop = whole.text[7:11]
    for depth in (0, 3):
        done = await engine.generate(
            "And it came to pass", max_tokens=60, ignore_eos=True, stop=stop, speculation=depth
        )
        assert done.finish_reason == "stop"
        assert done.text == whole.text[: whole.text.index(stop)]


async def test_a_stop_token_ends_the_request_inside_a_draft(engine: mtpbatch.Engine) -> None:
    whole = await engine.generate("And it came to pass", max_tokens=30, ignore_eos=True)
    stop = whole.token_ids[9]
    first = whole.token_ids.index(stop)
    done = await engine.generate(
        "And it came to pass", max_tokens=30, ignore_eos=True, stop_token_ids=[stop]
    )
    assert done.finish_reason == "stop"
    assert done.token_ids == whole.token_ids[: first + 1]
    assert done.text == await engine.detokenize(whole.token_ids[:first])


async def test_stop_texts_count_after_min_tokens(engine: mtpbatch.Engine) -> None:
    whole = await engine.generate("And it came to pass", max_tokens=60, ignore_eos=True)
    bounds = [len(await engine.detokenize(whole.token_ids[:n])) for n in range(61)]
    stop, n_found = "the", whole.text.count("the")
    assert n_found > 2
    for depth in (0, 3):
        for min_tokens in (0, 5, 15, 30):
            done = await engine.generate(
                "And it came to pass",
                max_tokens=60,
                min_tokens=min_tokens,
                ignore_eos=True,
                stop=stop,
                speculation=depth,
            )
            first = max(0, bounds[min_tokens] - len(stop) + 1)
            assert done.text == whole.text[: whole.text.index(stop, first)]


async def test_what_a_sampler_sees_does_not_depend_on_the_prefix_cache(
    demo_f32_path: Path,
) -> None:
    """A prompt whose state comes from a snapshot counts as one that was computed."""
    asked: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    async with mtpbatch.Engine.open(
        demo_f32_path, n_seq=2, n_ctx=512, kv_type="f32", n_threads=1
    ) as engine:
        first = await engine.generate("And it came to pass in those days, " * 12, **asked)
        turn = [*first.prompt_token_ids, *first.token_ids, *first.token_ids[:3]]
        plain = await engine.generate(turn, **asked, reuse_prefix=False)
        penalties: list[dict[str, Any]] = [{"repetition_penalty": 1.5}, {"dry_multiplier": 2.0}]
        for penalty in penalties:
            new = await engine.generate(turn, **asked, **penalty, reuse_prefix=False)
            again = await engine.generate(turn, **asked, **penalty)
            assert new.usage.cached_tokens == 0 < again.usage.cached_tokens
            assert new.token_ids == again.token_ids != plain.token_ids


async def test_the_context_ends_a_request_that_has_no_other_limit(engine: mtpbatch.Engine) -> None:
    prompt = await engine.tokenize("In the beginning ") * 100
    done = await engine.generate(prompt[:490], max_tokens=10_000, ignore_eos=True)
    assert done.finish_reason == "length"
    assert len(done.prompt_token_ids) + len(done.token_ids) == 512


async def test_leaving_a_stream_frees_its_sequence(engine: mtpbatch.Engine) -> None:
    async with engine.stream("def main(", max_tokens=400, ignore_eos=True) as deltas:
        async for _ in deltas:
            break
    done = await deltas
    assert done.finish_reason == "abort"
    assert 0 < len(done.token_ids) < 400


async def test_a_cancelled_scope_frees_its_sequence(engine: mtpbatch.Engine) -> None:
    follower = engine.submit("In the", max_tokens=400, ignore_eos=True)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel_after_a_step() -> None:
                async for _ in follower:
                    scope.cancel()

            group.start_soon(cancel_after_a_step)
            await engine.generate("def main(", max_tokens=400, ignore_eos=True)
    follower.cancel()
    assert (await follower).finish_reason == "abort"
    # Both are gone: the engine serves the next as if nothing had been.
    assert len((await engine.generate("In the", max_tokens=5, ignore_eos=True)).token_ids) == 5


async def test_a_queued_request_is_cancelled_before_it_is_prefilled(
    engine: mtpbatch.Engine,
) -> None:
    running = [engine.submit("In the", max_tokens=100, ignore_eos=True) for _ in range(4)]
    queued = engine.submit("def main(", max_tokens=100)
    queued.cancel()
    done = await queued
    assert (done.finish_reason, done.token_ids, done.timings.prefill) == ("abort", (), 0.0)
    for generation in running:
        assert len((await generation).token_ids) == 100
    assert engine.stats().prompt_tokens == 4 * len(await engine.tokenize("In the"))


async def test_a_request_is_cancelled_in_the_middle_of_its_prompt(engine: mtpbatch.Engine) -> None:
    long_prompt = (await engine.tokenize("In the beginning ") * 200)[:500]  # 16 chunks and more
    first = await engine.tokenize("In the")  # else it might enter after the victim
    clock = engine.submit(first, max_tokens=100, ignore_eos=True)
    victim = engine.submit(long_prompt, max_tokens=5)
    n_steps = 0
    async for _ in clock:
        n_steps += 1
        if n_steps == 4:
            victim.cancel()
    done = await victim
    assert (done.finish_reason, done.token_ids) == ("abort", ())
    assert 0 < engine.stats().prompt_tokens < 500


async def test_a_request_times_out_and_keeps_its_text(engine: mtpbatch.Engine) -> None:
    whole = await engine.generate("In the", max_tokens=500, ignore_eos=True)
    done = await engine.generate("In the", max_tokens=500, ignore_eos=True, timeout=0.02)
    assert done.finish_reason == "timeout"
    assert done.timings.total >= 0.02
    assert len(done.token_ids) < 500
    assert done.token_ids == whole.token_ids[: len(done.token_ids)]
    assert engine.stats().finished["timeout"] == 1


async def test_a_timeout_does_not_wait_for_the_step_under_way(
    demo_path: Path, isolation: Isolation
) -> None:
    sizes: dict[str, Any] = {
        "n_seq": 1,
        "n_ctx": 4096,
        "n_batch": 4096,
        "n_ubatch": 4096,
        "n_threads": 1,
    }
    async with mtpbatch.Engine.open(demo_path, isolation=isolation, **sizes) as engine:
        running = engine.submit([5] * 4000, max_tokens=5, timeout=0.2)  # a step of a second or so
        await until(lambda: engine.stats().running == 1 or running.completion is not None)
        for waiting in (engine.submit("In the", queue_timeout=0.01), running):
            done = await waiting
            assert (done.finish_reason, done.token_ids) == ("timeout", ())
            assert engine.stats().steps == 0, "the step is not over"
        assert len((await engine.generate("In the", max_tokens=5, ignore_eos=True)).token_ids) == 5


async def test_sampling_with_a_seed_is_repeatable_whoever_shares_the_batch(
    demo_f32_path: Path,
) -> None:
    ask: dict[str, Any] = {"max_tokens": 30, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    async with mtpbatch.Engine.open(
        demo_f32_path, n_seq=4, n_ctx=128, kv_type="f32", n_threads=1
    ) as engine:
        alone = await engine.generate("In the", seed=5, ignore_eos=True, **ask)
        neighbours = [
            engine.submit(p, seed=i, ignore_eos=True, **ask) for i, p in enumerate(PROMPTS)
        ]
        together = await engine.generate("In the", seed=5, ignore_eos=True, **ask)
        undrafted = await engine.generate("In the", seed=5, speculation=0, ignore_eos=True, **ask)
        for generation in neighbours:
            await generation
    assert alone.token_ids == together.token_ids == undrafted.token_ids


async def test_closing_ends_everything_with_abort(demo_path: Path, isolation: Isolation) -> None:
    async with mtpbatch.Engine.open(
        demo_path, n_seq=1, n_ctx=256, n_threads=1, isolation=isolation
    ) as engine:
        generations = [engine.submit("In the", max_tokens=250, ignore_eos=True) for _ in range(3)]
        async for _ in generations[0]:
            break
    assert [(await g).finish_reason for g in generations] == ["abort"] * 3
    with pytest.raises(mtpbatch.EngineClosedError):
        await engine.generate("In the")


async def test_several_event_loops_share_one_engine(engine: mtpbatch.Engine) -> None:
    texts: dict[int, str] = {}

    def other_app(number: int) -> None:
        async def ask() -> None:
            done = await engine.generate("And it came to pass", max_tokens=30, ignore_eos=True)
            texts[number] = done.text

        anyio.run(ask, backend="trio" if number % 2 else "asyncio")

    threads = [threading.Thread(target=other_app, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    here = await engine.generate("And it came to pass", max_tokens=30, ignore_eos=True)
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    assert len(texts) == 4
    assert all(len(text) > 0 for text in texts.values())
    assert here.finish_reason == "length"


async def test_a_model_without_heads_works_undrafted(dense_path: Path) -> None:
    async with mtpbatch.Engine.open(dense_path, n_seq=2, n_ctx=128, n_threads=1) as engine:
        done = await engine.generate("In the", max_tokens=20, ignore_eos=True)
        assert (len(done.token_ids), done.drafted, done.steps) == (20, 0, 20)
        assert not engine.stats().mtp
        with pytest.raises(mtpbatch.InvalidParameterError, match=r"speculation.*no MTP heads"):
            await engine.generate("In the", speculation=1)
    with pytest.raises(mtpbatch.InvalidParameterError, match=r"speculation.*no MTP heads"):
        async with mtpbatch.Engine.open(dense_path, speculation=2):
            pass


async def test_a_hybrid_model_without_heads_works_undrafted(tmp_path: Path) -> None:
    shape = random_model.RANDOM_SHAPE
    path = tmp_path / "headless.gguf"
    random_model.write_random(path, dataclasses.replace(shape, mtp=False))
    async with mtpbatch.Engine.open(path, n_seq=2, n_ctx=128, n_threads=1) as engine:
        done = await engine.generate("In the", max_tokens=20, ignore_eos=True)
        assert (len(done.token_ids), done.drafted) == (20, 0)


@pytest.mark.parametrize("isolation", ["none"])
@pytest.mark.parametrize(
    ("prompt", "params", "parameter"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        (None, {}, "prompt"),
        (b"In", {}, "prompt"),
        (bytearray(8), {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([2048], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([5] * 512, {}, "prompt"),
        ("x " * 5000, {}, "prompt"),
        ("In", {"temperature": -0.1}, "temperature"),
        ("In", {"temperature": float("nan")}, "temperature"),
        ("In", {"temperature": float("inf")}, "temperature"),
        ("In", {"temperature": "hot"}, "temperature"),
        ("In", {"top_p": 0}, "top_p"),
        ("In", {"top_k": -1}, "top_k"),
        ("In", {"min_p": 1.1}, "min_p"),
        ("In", {"max_tokens": 0}, "max_tokens"),
        ("In", {"seed": -1}, "seed"),
        ("In", {"stop": [""]}, "stop"),
        ("In", {"stop_token_ids": [99999]}, "stop_token_ids"),
        ("In", {"speculation": 4}, "speculation"),
        ("In", {"speculation": "always"}, "speculation"),
        ("In", {"tempature": 1}, "tempature"),
    ],
)
async def test_a_bad_request_names_its_parameter_and_disturbs_nobody(
    engine: mtpbatch.Engine, prompt: Any, params: dict[str, Any], parameter: str
) -> None:
    other = engine.submit("In the", max_tokens=10, ignore_eos=True)
    with pytest.raises(mtpbatch.InvalidParameterError) as caught:
        await engine.generate(prompt, **params)
    assert caught.value.parameter == parameter
    assert str(caught.value).startswith(f"{parameter}: ")
    assert len((await other).token_ids) == 10


@pytest.mark.parametrize(
    ("config", "parameter"),
    [
        ({"n_seq": 0}, "n_seq"),
        ({"n_seq": 257}, "n_seq"),
        ({"n_ctx": 3}, "n_ctx"),
        ({"n_ctx": 2**31}, "n_ctx"),
        ({"n_ctx": 2**30, "n_seq": 2}, "n_ctx"),
        ({"n_batch": 3}, "n_batch"),
        ({"n_ubatch": 2}, "n_ubatch"),
        ({"n_threads": 0}, "n_threads"),
        ({"kv_type": "f8"}, "kv_type"),
        ({"speculation": 4}, "speculation"),
        ({"n_draft_max": 33}, "n_draft_max"),
        ({"n_sequences": 3}, "n_sequences"),
    ],
)
async def test_a_bad_config_names_its_parameter(
    demo_path: Path, config: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(mtpbatch.InvalidParameterError) as caught:
        async with mtpbatch.Engine.open(demo_path, **config):
            pass
    assert caught.value.parameter == parameter


async def test_a_bad_file_is_a_clear_error(
    tmp_path: Path, demo_path: Path, isolation: Isolation
) -> None:
    missing = tmp_path / "missing.gguf"
    not_gguf = tmp_path / "notes.gguf"
    not_gguf.write_text("Dear diary")
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(demo_path.read_bytes()[:200_000])
    for path, words in ((missing, "no such file"), (not_gguf, "not a GGUF"), (truncated, "llama")):
        with pytest.raises(mtpbatch.ModelLoadError, match=words) as caught:
            async with mtpbatch.Engine.open(path, isolation=isolation):
                pass
        assert str(path) in str(caught.value)


async def test_the_repr_shows_what_was_chosen(engine: mtpbatch.Engine) -> None:
    assert "n_seq=4" in repr(engine)
    assert "n_threads=1" in repr(engine)
    assert "0 running, 0 waiting" in repr(engine)
    assert None not in (engine.config.n_ctx, engine.config.n_batch, engine.config.n_ubatch)
