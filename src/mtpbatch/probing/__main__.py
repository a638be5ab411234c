"""The program that tries model files out: a line of JSON in for each, and one out.

usage: python -m mtpbatch.probing BYTES

It may take BYTES of address space. Some files end it.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from typing import Final

import msgspec

from mtpbatch.engine import Engine
from mtpbatch.exceptions import ModelLoadError, MtpBatchError
from mtpbatch.probing.messages import Found, Probe

_N_CTX: Final = 64
_N_TOKENS: Final = 8  # of an answer: more than one step, with drafts


def main() -> None:
    memory = int(sys.argv[1])
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(
            kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )
    for line in sys.stdin.buffer:
        probe = msgspec.json.decode(line, type=Probe)
        found = asyncio.run(_try_out(probe))
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
        sys.stdout.buffer.flush()


async def _try_out(probe: Probe) -> Found:
    try:
        async with Engine.open(
            probe.model,
            draft_model=probe.draft_model,
            lora=probe.lora,
            n_seq=1,
            n_ctx=_N_CTX,
            n_gpu_layers=0,
            snapshot_memory=0,
        ) as engine:
            await engine.generate("In the beginning", max_tokens=_N_TOKENS, ignore_eos=True)
    except ModelLoadError as error:
        return Found(str(error))
    except (MtpBatchError, MemoryError) as error:
        return Found(f"{probe.model}: cannot be used: {error or type(error).__name__}")
    return Found()


if __name__ == "__main__":
    main()
