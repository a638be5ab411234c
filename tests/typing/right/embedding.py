"""Texts by their meaning."""

import numpy as np
import numpy.typing as npt

from mtpbatch import Embeddings, Engine


async def nearest(engine: Engine, query: str, texts: list[str]) -> int:
    found: Embeddings = await engine.embed([query, *texts])
    vectors: npt.NDArray[np.float32] = found.vectors
    print(found.prompt_tokens)
    return int(np.argmax(vectors[1:] @ vectors[0]))
