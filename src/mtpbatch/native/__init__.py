"""The native layer, for those who write their own loop.

llama.cpp's own output is kept quiet from the first :class:`Model` on; what it says of errors is
in the exceptions' messages.
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
