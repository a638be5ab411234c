"""One answer, many, some of one prompt, and what is in them."""

import asyncio
from collections.abc import Sequence

import mtpbatch


async def answer(path: str, prompts: Sequence[str]) -> list[str]:
    async with mtpbatch.Engine.open(path, n_seq=16, kv_type="q8_0", n_draft_max=4) as engine:
        first = await engine.generate(prompts[0], max_tokens=64, stop="\n\n", seed=7)
        rest = await engine.generate_many(prompts[1:], temperature=0.8, top_p=0.95)
        drawn = await engine.generate_n(prompts[0], 3, temperature=1, logit_bias={11: -100})
        from_tokens = await engine.generate(await engine.tokenize("In the"), max_tokens=8)
        print(engine.model.n_ctx, engine.config.n_threads, from_tokens.tokens_per_step)
    acceptance = first.accepted / first.drafted if first.drafted else None
    print(acceptance, first.usage.cached_tokens, first.timings.first_token, first.finish_reason)
    return [done.text for done in (first, *rest, *drawn)]


texts: list[str] = asyncio.run(answer("model.gguf", ["a", "b"]))
