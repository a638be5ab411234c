"""Print the tokens per second of llama-cpp-python's ``Llama``, which runs one sequence at a time.

python -m benchmarks.llama_alone wide.gguf
"""

from __future__ import annotations

import argparse
import time

import llama_cpp

from benchmarks.workload import N_CTX, PROMPTS
from mtpbatch.machine import available_cpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=96, help="per prompt")
    parser.add_argument("--threads", type=int, default=available_cpus())
    options = parser.parse_args()
    llm = llama_cpp.Llama(
        options.model,
        n_ctx=N_CTX,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )
    llm.eval(llm.tokenize(b"warm-up"))
    llm.reset()
    begin = time.perf_counter()
    for text in PROMPTS:
        prompt = llm.tokenize(text.encode())
        for produced, _ in enumerate(llm.generate(prompt, temp=0.0), 1):
            if produced == options.tokens:
                break
    print(len(PROMPTS) * options.tokens / (time.perf_counter() - begin))


if __name__ == "__main__":
    main()
