"""Model: loading and its failures, the vocabulary, and use from several threads."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpbatch._slices import SLICE
from mtpbatch.exceptions import ContextError, InvalidParameterError, ModelLoadError
from mtpbatch.native import Model
from mtpbatch.native._library import ffi

# Any character but the lone surrogates, which no UTF-8 can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MARKUP = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\0", "👩‍🚀", " \n"])


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Model:
    return Model(demo_path)


# ----------------------------------------------------------------------------------- facts


def test_facts_of_the_demo_model(demo: Model) -> None:
    assert demo.architecture == "qwen35"
    assert demo.hybrid
    assert not demo.recurrent
    assert demo.keeps_recurrent_state
    assert demo.n_mtp_heads == 1
    assert demo.n_vocab == 2048
    assert demo.n_ctx_train > 0
    assert demo.n_embd > 0
    assert demo.n_layer > 0
    assert demo.n_params > 0
    assert 0 < demo.n_bytes <= demo.path.stat().st_size
    assert demo.eos in demo.eog_tokens
    assert all(0 <= token < demo.n_vocab for token in demo.eog_tokens)
    assert "qwen35" in demo.description
    assert demo.metadata("general.architecture") == "qwen35"
    assert demo.metadata("no.such.key") is None
    assert demo.chat_template is None or isinstance(demo.chat_template, str)


def test_facts_of_a_model_without_heads(dense: Model) -> None:
    assert dense.architecture == "llama"
    assert dense.n_mtp_heads == 0
    assert not dense.keeps_recurrent_state
    assert not dense.hybrid


# ------------------------------------------------------------------------------ vocabulary


def test_the_vocabulary_is_bytes_except_of_control_tokens(demo: Model) -> None:
    assert len(demo.vocabulary) == demo.n_vocab
    for token, data in enumerate(demo.vocabulary):
        if demo.is_control(token):
            assert data == b""
            assert demo.token_bytes(token, special=True).startswith(b"<")
    assert {bytes([b]) for b in range(256)} <= set(demo.vocabulary)


@pytest.mark.parametrize("token", [-1, 2048, 2**31 - 1])
def test_tokens_that_do_not_exist(demo: Model, token: int) -> None:
    assert demo.token_bytes(token) == b""
    assert not demo.is_control(token)
    with pytest.raises(InvalidParameterError, match=f"token {token} at index 1"):
        demo.detokenize([5, token])


def test_a_token_too_large_for_an_integer_is_refused(demo: Model) -> None:
    with pytest.raises(InvalidParameterError, match="tokens"):
        demo.detokenize([2**40])


@given(st.lists(st.integers(0, 2047), max_size=40))
def test_the_bytes_of_tokens_joined_are_their_text(demo: Model, tokens: list[int]) -> None:
    joined = b"".join(demo.vocabulary[token] for token in tokens)
    assert demo.detokenize(tokens) == joined.decode("utf-8", "replace")


@given(TEXT)
def test_any_text_survives_as_tokens(demo: Model, text: str) -> None:
    tokens = demo.tokenize(text, parse_special=False)
    assert demo.detokenize(tokens) == text
    assert all(not demo.is_control(token) for token in tokens if token != demo.bos)


@given(st.lists(TEXT | MARKUP, max_size=6).map("".join))
def test_markup_survives_as_control_tokens(demo: Model, text: str) -> None:
    tokens = demo.tokenize(text, parse_special=True)
    assert demo.detokenize(tokens, special=True) == text


def test_markup_is_control_tokens_only_if_parsed(demo: Model) -> None:
    assert demo.eos is not None
    markup = demo.token_bytes(demo.eos, special=True).decode()
    assert demo.tokenize(markup, parse_special=True) == [demo.eos]
    plain = demo.tokenize(markup, parse_special=False)
    assert demo.eos not in plain
    assert demo.detokenize(plain) == markup
    assert demo.detokenize([demo.eos]) == ""


def test_long_texts_survive(demo: Model) -> None:
    text = "And it came to pass 🌍, that 12345.\n\0" * 20_000
    tokens = demo.tokenize(text)
    assert len(tokens) > 100_000
    assert demo.detokenize(tokens) == text


@pytest.mark.parametrize("n_tokens", [4096, 4097, 30_000])
def test_the_bytes_of_many_tokens_joined_are_their_text(demo: Model, n_tokens: int) -> None:
    """Characters are cut, and bytes that begin none, also where slices end."""
    tokens = random.Random(n_tokens).choices(range(demo.n_vocab), k=n_tokens)
    joined = b"".join(demo.vocabulary[token] for token in tokens)
    assert demo.detokenize(tokens) == joined.decode("utf-8", "replace")


def test_long_texts_are_converted_in_slices(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Ffi:
        """What converts arrays to lists, watched."""

        def __getattr__(self, name: str) -> Any:
            return getattr(ffi, name)

        def unpack(self, array: Any, length: int) -> Any:
            sizes.append(length)
            return ffi.unpack(array, length)

    monkeypatch.setattr("mtpbatch.native.model.ffi", Ffi())
    tokens = demo.tokenize("And it came to pass " * 5000)
    assert sum(sizes) == len(tokens) > 20_000
    assert max(sizes) <= SLICE


def test_an_empty_text_has_no_tokens(demo: Model) -> None:
    assert demo.tokenize("", add_special=False) == []
    assert demo.detokenize([]) == ""


def test_a_lone_surrogate_is_refused(demo: Model) -> None:
    with pytest.raises(InvalidParameterError, match=r"text: .* at index 2 is a lone surrogate"):
        demo.tokenize("ab\ud800")


# --------------------------------------------------------------------------------- loading


def test_progress_rises_to_one(demo_path: Path) -> None:
    fractions: list[float] = []
    Model(demo_path, progress=fractions.append).close()
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(0 <= fraction <= 1 for fraction in fractions)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_progress_can_stop_the_loading(demo_path: Path, after: int) -> None:
    calls: list[float] = []

    def report(fraction: float) -> bool:
        calls.append(fraction)
        return len(calls) < after

    with pytest.raises(ModelLoadError, match=r"demo\.gguf: .*stopped by the progress"):
        Model(demo_path, progress=report)
    assert len(calls) == after


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_progress_comes_out_unchanged(
    demo_path: Path, kind: type[BaseException]
) -> None:
    error = kind("mine")

    def report(fraction: float) -> bool:
        raise error

    with pytest.raises(kind) as caught:
        Model(demo_path, progress=report)
    assert caught.value is error


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"absent\.gguf: no such file"):
        Model(tmp_path / "absent.gguf")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"{tmp_path}: not a file"):
        Model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model", b"\0" * 1000])
def test_a_file_that_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.gguf: not a GGUF file"):
        Model(path)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        b"GGUF" + b"\xff" * 500,
        b"GGUF" + bytes(range(256)) * 4,
        b"GGUF\x03\0\0\0" + b"\xff" * 16,
        b"GGUF\x03\0\0\0" + b"\0" * 16,
        b"GGUF\x63\0\0\0" + b"\0" * 16,
    ],
    ids=["magic only", "ones", "bytes", "huge counts", "nothing in it", "version 99"],
)
def test_garbage_behind_the_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.gguf: .*llama\.cpp could not load"):
        Model(path)


@pytest.mark.parametrize("kept", [5, 20, 100, 5_000, 40_000, 0.5, 0.9, 0.99999])
def test_a_truncated_gguf(tmp_path: Path, demo_path: Path, kept: float) -> None:
    """Cut in the header, the metadata, the tensor list and the tensors."""
    data = demo_path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf: "):
        Model(path)


@pytest.mark.parametrize("sections", [(0, 0, 0, 0), (3, 3, -1, 0), (200, 0, 0, 0)])
def test_a_header_that_divides_heads_impossibly_is_refused(
    demo_path: Path, tmp_path: Path, sections: tuple[int, ...]
) -> None:
    """libllama would abort in the first decode."""
    data = bytearray(demo_path.read_bytes())
    name = b"qwen35.rope.dimension_sections"
    at = data.index(name) + len(name) + 16  # behind its type, that of its elements, their number
    data[at : at + 16] = struct.pack("<4i", *sections)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"damaged: qwen35\.rope\.dimension_sections"):
        Model(damaged)


def test_a_vocabulary_in_which_tokens_are_spelt_alike_is_refused(
    demo_path: Path, tmp_path: Path
) -> None:
    """libllama would abort."""
    a, b = (struct.pack("<Q", 1) + letter for letter in (b"a", b"b"))
    data = demo_path.read_bytes()
    assert data.count(a) == 1
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data.replace(a, b))
    with pytest.raises(ModelLoadError, match=r"damaged: token \d+ is spelt like one before it"):
        Model(damaged)


def test_a_path_of_any_characters(tmp_path: Path, tiny_path: Path) -> None:
    path = tmp_path / "modèle 模型 %s.gguf"
    path.symlink_to(tiny_path)
    with Model(str(path)) as model:
        assert path.name in repr(model)


# -------------------------------------------------------------------------------- lifetime


def test_close_is_idempotent_and_ends_use(tiny_path: Path) -> None:
    with Model(tiny_path) as model:
        assert model.eog_tokens
    model.close()
    model.close()
    assert model.closed
    assert "closed" in repr(model)
    calls: list[Callable[[], object]] = [
        lambda: model.tokenize("a"),
        lambda: model.detokenize([1]),
        lambda: model.token_bytes(1),
        lambda: model.is_control(1),
        lambda: model.metadata("general.name"),
        lambda: model.chat_template,
        lambda: model.vocabulary,
    ]
    for use in calls:
        with pytest.raises(ContextError, match="this Model is closed"):
            use()
    assert model.eog_tokens  # read before


@settings(max_examples=5)
@given(st.integers(1, 50))
def test_threads_can_tokenize_while_another_closes(tiny_path: Path, calls: int) -> None:
    """Every call gives the right tokens or says that the model is closed."""
    model = Model(tiny_path)
    text = "And it came to pass. " * 50
    expected = model.tokenize(text)
    start = threading.Barrier(4)
    wrong: list[object] = []
    done = threading.Semaphore(0)

    def tokenize() -> None:
        start.wait()
        try:
            while True:
                tokens = model.tokenize(text)
                if tokens != expected:
                    wrong.append(tokens)
                done.release()
        except ContextError:
            pass
        except BaseException as error:
            wrong.append(error)
        finally:
            done.release()

    threads = [threading.Thread(target=tokenize) for _ in range(3)]
    for thread in threads:
        thread.start()
    start.wait()
    for _ in range(calls):
        done.acquire()
    model.close()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 2**31),
        ("nextn_predict_layers", 2**31),
        ("nextn_predict_layers", 5),  # of a block_count of 5
        ("full_attention_interval", 0),
        ("rope.dimension_count", 0),
        ("rope.dimension_count", 5),
        ("ssm.inner_size", 0),
        ("ssm.state_size", 0),
        ("ssm.group_count", 0),
        ("ssm.time_step_rank", 0),
    ],
)
def test_a_header_with_impossible_numbers_is_refused(
    demo_path: Path, tmp_path: Path, key: str, value: int
) -> None:
    """libllama would abort, or divide by zero."""
    data = bytearray(demo_path.read_bytes())
    name = f"qwen35.{key}".encode()
    at = data.index(name) + len(name)
    assert data[at : at + 4] == (4).to_bytes(4, "little")  # its type: an unsigned 32-bit number
    data[at + 4 : at + 8] = value.to_bytes(4, "little")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with pytest.raises(ModelLoadError, match=rf"damaged: qwen35\.{key} is {value}"):
        Model(damaged)


@pytest.mark.parametrize("path", ["a\0b", ""])
def test_a_path_that_cannot_be_one_is_refused(path: str) -> None:
    with pytest.raises(ModelLoadError):
        Model(path)
