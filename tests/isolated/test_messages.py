"""What crosses between the app and the model's process: values, errors, and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from mtpbatch import exceptions
from mtpbatch.exceptions import (
    DecodeError,
    EngineOverloaded,
    InternalError,
    InvalidParameterError,
    MtpBatchError,
    NativeDiedError,
    PromptTooLongError,
)
from mtpbatch.isolated.channel import Channel, HangUp, Notes, read_note
from mtpbatch.isolated.messages import Exchange, Failure, Progress
from mtpbatch.types import Admission, Plan, SamplingParams, StepResult


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def whole_tree(kind: type[MtpBatchError] = MtpBatchError) -> Iterator[type[MtpBatchError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == exceptions.__name__:
            yield from whole_tree(below)


def example(kind: type[MtpBatchError]) -> MtpBatchError:
    match kind:
        case exceptions.InvalidParameterError:
            return kind("top_p", "is wrong")
        case exceptions.PromptTooLongError:
            return kind(7, 5)
        case exceptions.EngineOverloaded:
            limits: dict[str, Any] = {"max_waiting": 3, "max_waiting_tokens": None}
            return EngineOverloaded(running=1, waiting=2, waiting_tokens=3, **limits)
        case exceptions.EngineStalledError:
            return kind(1.5, 1.0, 3)
        case exceptions.NativeDiedError:
            return kind(-11)
        case _:
            return kind("it is so: größer")


def over(ends: tuple[socket.socket, socket.socket], message: object, kind: Any) -> Any:
    ours, theirs = map(Channel, ends)
    ours.send(message)
    return theirs.receive(kind)


@pytest.mark.parametrize("kind", [*whole_tree()])
def test_every_error_comes_out_as_it_went_in(
    ends: tuple[socket.socket, socket.socket], kind: type[MtpBatchError]
) -> None:
    error = example(kind)
    with pytest.raises(kind) as caught:
        over(ends, Failure.of(error), int)
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)
    assert caught.value.completion is None


def test_a_bug_comes_out_with_its_traceback(ends: tuple[socket.socket, socket.socket]) -> None:
    def bug() -> None:
        raise KeyError("oh")

    with pytest.raises(KeyError) as raised:
        bug()
    with pytest.raises(InternalError, match=r"(?s)model's process.*in bug.*KeyError: 'oh'"):
        over(ends, Failure.of(raised.value), int)


@pytest.mark.parametrize("kind", ["SystemExit", "os", "TYPE_CHECKING", "nothing", "signal"])
def test_only_errors_of_the_tree_are_made_from_a_name(kind: str) -> None:
    assert type(Failure(kind, "words", {}).error) is InternalError


def test_a_step_comes_with_its_failure(ends: tuple[socket.socket, socket.socket]) -> None:
    result = StepResult(3, (), 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, error=DecodeError("no slot"))
    [found] = over(ends, (result,), tuple[StepResult, ...])
    assert isinstance(found.error, DecodeError)
    assert str(found.error) == "no slot"
    assert msgspec.structs.replace(found, error=None) == msgspec.structs.replace(result, error=None)


def test_a_plan_comes_with_the_numbers_of_its_grammars(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    class Grammar:
        number = 17

    params = SamplingParams(logit_bias={5: -1.5}, stop=("é",))
    plan = Plan((1,), (Admission(0, params, 7, (1, 2), 5, grammar=Grammar()),), ())
    found = over(ends, Exchange(plan, True, None, (4,)), Exchange)
    assert found.plan.admit[0].grammar == 17
    assert found.plan.admit[0].params == params
    assert (found.wait, found.timeout, found.forgotten) == (True, None, (4,))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0" * 5,
        b"\xff" * 64,
        b"\0" + (5).to_bytes(8, "little") + b"\xc1" * 5,
        b"\0" + (1).to_bytes(8, "little") + b"\x90",
        b"\1" + (1).to_bytes(8, "little") + b"\x01",
        b"\1" + (50_003).to_bytes(8, "little") + b"\x81\xa1x" + b"\x91" * 49_999 + b"\x01",
        b"\0" + (2**40).to_bytes(8, "little"),
        b"\0" + (100).to_bytes(8, "little") + b"too few",
    ],
    ids=lambda sent: repr(sent[:30]),
)
def test_what_is_no_message_counts_as_the_end(
    ends: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    ours, theirs = ends
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(HangUp):
        Channel(ours).receive(Progress)


def test_a_step_may_not_fail_with_any_error(ends: tuple[socket.socket, socket.socket]) -> None:
    result = StepResult(3, (), 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    values = msgspec.to_builtins(result)
    values["error"] = msgspec.to_builtins(Failure.of(InvalidParameterError("top_p", "is wrong")))
    with pytest.raises(HangUp):
        over(ends, (values,), tuple[StepResult, ...])


def test_notes_come_in_order_and_never_wait(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    notes = Notes(ours)
    for number in range(100_000):  # more than the socket holds
        notes.send(number)
    notes.hang_up()
    read = []
    while (note := read_note(theirs)) is not None:
        read.append(note)
    assert read == list(range(len(read)))
    assert 100 < len(read) < 100_000
    theirs.close()
    notes.send(1)


def test_a_message_after_the_end_of_who_would_read_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(HangUp):
        Channel(ours).ask(Progress(0.5), int)


def test_errors_have_their_own_fields() -> None:
    error = Failure.of(PromptTooLongError(7, 5)).error
    assert isinstance(error, PromptTooLongError)
    assert (error.parameter, error.n_tokens, error.n_ctx) == ("prompt", 7, 5)
    died = Failure.of(NativeDiedError(3)).error
    assert isinstance(died, NativeDiedError)
    assert died.returncode == 3
    assert "exit status 3" in str(died)
