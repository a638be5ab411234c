"""The program in which grammars are tried: a line of JSON in for each, and one out.

usage: python trial_process.py FOLDER CPU_SECONDS BYTES

FOLDER is where llguidance is. It knows nothing of mtpbatch, so that it starts quickly. When a
grammar takes more than CPU_SECONDS, BYTES of memory or a small stack, the system ends it. It ends
with its input, and so with the app.
"""

from __future__ import annotations

import json
import math
import random
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

# Deep recursion is to end here rather than on the threads of the engine, which have more.
_STACK = 256 << 10
_STEPS = 64  # of an answer, made at random

# At most one blank between two parts of JSON, or a line break and some indentation: models that may
# write as many as they like do not always find an end. A schema's own "x-guidance" goes first.
_WHITESPACE: JsonCompileOptions = {"whitespace_pattern": r"( |\r?\n[ \t]{0,40})?"}


def main() -> None:
    folder, cpu_seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(request, signal.SIG_IGN)  # the app decides when it ends
    del sys.path[0]  # this file's folder
    sys.path.insert(0, folder)
    _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CORE, 0)
    tokenizer = _tokenizer_of_bytes()
    threading.stack_size(_STACK)
    for line in sys.stdin:
        parameter, text = json.loads(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_seconds)
        answer: dict[str, str] = {}

        def try_out(
            parameter: str = parameter, text: str = text, answer: dict[str, str] = answer
        ) -> None:
            try:
                answer["grammar"] = _compile(tokenizer, parameter, text)
            except Exception as error:  # not of llguidance alone: see what its GBNF reader raises
                answer["error"] = (str(error) or repr(error)).removesuffix("\n<non-verbose/>")

        thread = threading.Thread(target=try_out)
        thread.start()
        thread.join()
        print(json.dumps(answer), flush=True)


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _tokenizer_of_bytes() -> LLTokenizer:
    """Each byte is a token; one more ends an answer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Bytes:
        bos_token_id = None
        eos_token_id = 256
        special_token_ids = (256,)
        tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return LLTokenizer(TokenizerWrapper(Bytes()))


def _compile(tokenizer: LLTokenizer, parameter: str, text: str) -> str:
    """The grammar in llguidance's own JSON. Raises ValueError if it cannot do it."""
    from llguidance import LLMatcher, LLParserLimits
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    match parameter:
        case "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(text, _WHITESPACE)
        case "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        case "choice":
            texts = (json.dumps(choice) for choice in json.loads(text))
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
        case _:
            try:
                grammar = LLMatcher.grammar_from_lark(any_to_lark(text))
            except GbnfToLarkError as error:
                raise ValueError(str(error)) from None
    matcher = LLMatcher(
        tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)
    )
    # What cannot go on, or goes on too slowly, mostly shows soon.
    draw = random.Random(0)
    for _ in range(_STEPS):
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        if matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if not allowed:
            break
        matcher.consume_token(draw.choice(allowed))
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return grammar


if __name__ == "__main__":
    main()
