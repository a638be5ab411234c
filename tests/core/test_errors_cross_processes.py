"""Errors keep what they say and hold when they are pickled, as they are on the way to others."""

from __future__ import annotations

import copy
import pickle

import pytest

from mtpbatch import (
    EngineOverloaded,
    EngineStalledError,
    InvalidParameterError,
    LibraryMismatchError,
    MtpBatchError,
    PromptTooLongError,
)


@pytest.mark.parametrize(
    "error",
    [
        MtpBatchError("words"),
        InvalidParameterError("top_p", "must be > 0, got 0"),
        PromptTooLongError(300, 256),
        EngineStalledError(61.5, 60.0, 3),
        LibraryMismatchError("another version"),
        EngineOverloaded(
            running=1, waiting=2, waiting_tokens=30, max_waiting=2, max_waiting_tokens=None
        ),
    ],
)
def test_an_error_is_the_same_on_the_other_side(error: MtpBatchError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))
