"""How deep a request drafts: what it asks for, what the config says, what the model can."""

from __future__ import annotations

import pytest

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.speculation import draft_wish
from mtpbatch.types import EngineConfig, ModelFacts, Speculation


def facts(n_draft_max: int) -> ModelFacts:
    return ModelFacts(
        n_ctx=64,
        n_seq=2,
        n_batch=32,
        n_draft_max=n_draft_max,
        n_vocab=100,
        eog_token_ids=frozenset(),
        n_cells=128,
        n_ubatch=32,
    )


@pytest.mark.parametrize(
    ("requested", "configured", "depth"),
    [
        (None, "auto", 3),
        (None, 2, 2),
        (None, 0, 0),
        ("auto", 1, 3),
        (0, "auto", 0),
        (1, 3, 1),
        (3, 0, 3),
    ],
)
def test_the_requests_wish_goes_before_the_configs(
    requested: Speculation | None, configured: Speculation, depth: int
) -> None:
    assert draft_wish(requested, EngineConfig(speculation=configured), facts(3)).limit == depth


@pytest.mark.parametrize("requested", [None, "auto", 0])
def test_without_heads_nothing_is_drafted(requested: Speculation | None) -> None:
    assert draft_wish(requested, EngineConfig(), facts(0)).limit == 0


def test_without_heads_asking_for_drafts_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(InvalidParameterError, match=r"no MTP heads.*use speculation=0") as caught:
        draft_wish(1, EngineConfig(), facts(0))
    assert caught.value.parameter == "speculation"


def test_deeper_than_the_engine_drafts_is_an_error() -> None:
    with pytest.raises(InvalidParameterError, match="4 is deeper than n_draft_max=3"):
        draft_wish(4, EngineConfig(), facts(3))
