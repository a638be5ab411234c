"""A wrapper that hands on what it is given."""

from collections.abc import AsyncIterator
from typing import Unpack

from mtpbatch import Engine, EngineOptions, SamplingOptions

CAREFUL: SamplingOptions = {"temperature": 0.2, "top_p": 0.9, "stop": ["\n"]}
SMALL: EngineOptions = {"n_seq": 2, "n_ctx": 1024}


class Asker:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ask(self, question: str, **params: Unpack[SamplingOptions]) -> str:
        options: SamplingOptions = {**CAREFUL, **params}
        return (await self._engine.generate(f"Q: {question}\nA:", **options)).text

    async def follow(self, question: str, **params: Unpack[SamplingOptions]) -> AsyncIterator[str]:
        async with self._engine.stream(question, **params) as deltas:
            async for delta in deltas:
                yield delta.text


async def main() -> None:
    async with Engine.open("model.gguf", **SMALL) as engine:
        asker = Asker(engine)
        print(await asker.ask("How much is 6 times 7?", max_tokens=8))
        async for text in asker.follow("And 7 times 8?", seed=1):
            print(text)
