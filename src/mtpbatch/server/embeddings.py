"""``/v1/embeddings``."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import anyio.to_thread

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.server.endpoint import Answer, Service
from mtpbatch.server.errors import named_as
from mtpbatch.server.protocol import (
    Embedding,
    EmbeddingAnswer,
    EmbeddingRequest,
    EmbeddingUsage,
    listed,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


async def embed(service: Service, asked: EmbeddingRequest, answer: Answer) -> None:
    """Answer a request."""
    with named_as({"texts": "input"}):
        found = await service.engine.embed(listed("input", asked.input))
    n_embd = found.vectors.shape[1]
    if asked.dimensions not in (None, n_embd):
        raise InvalidParameterError(
            "dimensions", f"must be {n_embd}, as the model has, or left out; got {asked.dimensions}"
        )
    # On a thread: many numbers take long to write.
    written = await anyio.to_thread.run_sync(_written, found.vectors, asked.encoding_format)
    await answer.json(
        EmbeddingAnswer(
            data=written,
            model=service.config.model_name,
            usage=EmbeddingUsage(found.prompt_tokens, found.prompt_tokens),
        )
    )


def _written(vectors: npt.NDArray[np.float32], encoding: str | None) -> list[Embedding]:
    if encoding == "base64":
        values = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        values = [vector.tolist() for vector in vectors]
    return [Embedding(index=index, embedding=value) for index, value in enumerate(values)]
