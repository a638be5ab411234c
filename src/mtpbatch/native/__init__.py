"""The native layer, for those who write their own loop.

llama.cpp's own output is kept quiet from the first :class:`Model` on; what it says of errors is
in the exceptions' messages.

::

    from mtpbatch.native import Batch, Context, Model

    with Model("model.gguf") as model, Context(model, n_ctx=512) as context:
        token_ids = model.tokenize("In the beginning")
        for _ in range(20):
            batch = Batch()
            rows = batch.add_sequence(token_ids, position=context.length(0), seq_id=0)
            context.decode(batch)
            token_ids = [int(context.logits(rows[-1]).argmax())]
            print(model.detokenize(token_ids), end="")
"""

from mtpbatch.native.backend import NativeBackend
from mtpbatch.native.context import Batch, Context
from mtpbatch.native.embedder import Embedder
from mtpbatch.native.executor import Executor
from mtpbatch.native.logprobs import token_logprobs
from mtpbatch.native.model import Model
from mtpbatch.native.sampler import Sampler
from mtpbatch.native.session import (
    DraftRequest,
    MtpSession,
    MtpSessionConfig,
    MtpSessionStatistics,
)

__all__ = [
    "Batch",
    "Context",
    "DraftRequest",
    "Embedder",
    "Executor",
    "Model",
    "MtpSession",
    "MtpSessionConfig",
    "MtpSessionStatistics",
    "NativeBackend",
    "Sampler",
    "token_logprobs",
]
