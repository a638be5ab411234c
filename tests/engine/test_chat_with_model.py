"""Chat on the packaged model, against prompts written by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import mtpbatch

pytestmark = pytest.mark.anyio

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "In the beginning"},
]
# The demo model's template, filled in by hand, in tokens: markup and texts by turns.
PIECES = ["<|im_start|>", "system\nBe brief.", "<|im_end|>", "\n", "<|im_start|>"]
PIECES += ["user\nIn the beginning", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]


async def test_the_same_answer_as_to_the_prompt_written_by_hand(demo_f32_path: Path) -> None:
    async with mtpbatch.Engine.open(
        demo_f32_path, n_seq=2, n_ctx=256, n_threads=1, kv_type="f32"
    ) as engine:
        assert engine.apply_chat_template(MESSAGES) == "".join(PIECES)
        prompt: list[int] = []
        for piece in PIECES:
            prompt += await engine.tokenize(piece, add_special=False)
        for depth in (0, 3):
            wanted = await engine.generate(prompt, max_tokens=30, ignore_eos=True, speculation=0)
            answer = await engine.chat(MESSAGES, max_tokens=30, ignore_eos=True, speculation=depth)
            assert answer.completion.prompt_token_ids == tuple(prompt)
            assert answer.completion.token_ids == wanted.token_ids
            assert answer.content == wanted.text
            async with engine.stream_chat(
                MESSAGES, max_tokens=30, ignore_eos=True, speculation=depth
            ) as deltas:
                assert "".join([delta.content async for delta in deltas]) == wanted.text


async def test_a_template_that_begins_with_bos_gives_one_bos(
    demo_path: Path, tmp_path: Path
) -> None:
    """Of a model that wants one before every text: the file is changed so, in place."""
    data = demo_path.read_bytes()
    key = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)  # a boolean follows
    data = data.replace(key + b"\0", key + b"\1")
    begin = data.index(b"{% for message in messages %}")
    end = data.index(b"{% endif %}", begin) + len(b"{% endif %}")
    template = b"{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    path = tmp_path / "bos.gguf"
    path.write_bytes(
        data[:begin] + template + b"{#%*s#}" % (end - begin - len(template) - 4, b"") + data[end:]
    )
    messages = [{"role": "user", "content": "In the beginning"}]
    async with mtpbatch.Engine.open(path, n_seq=1, n_ctx=128, n_threads=1) as engine:
        assert engine.apply_chat_template(messages) == "<|endoftext|>In the beginning<|im_end|>"
        [bos] = await engine.tokenize("<|endoftext|>", add_special=False)
        [eos] = await engine.tokenize("<|im_end|>", add_special=False)
        text = await engine.tokenize("In the beginning", add_special=False)
        answer = await engine.chat(messages, max_tokens=2, ignore_eos=True)
        assert answer.completion.prompt_token_ids == (bos, *text, eos)
        plain = await engine.generate("In the beginning", max_tokens=2, ignore_eos=True)
        assert plain.prompt_token_ids == (bos, *text)
