"""How many tokens to draft. Pure: a request's wish, the engine's config and the model's facts.

The depth is fixed for now: a request's own, or the engine's, or the deepest there is.
"""

from __future__ import annotations

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.types import EngineConfig, ModelFacts, Speculation


def draft_limit(requested: Speculation | None, config: EngineConfig, facts: ModelFacts) -> int:
    """Most tokens a request may draft per step.

    ``requested`` is the request's ``speculation``; ``None`` leaves it to ``config``. ``"auto"``
    on a model without MTP heads is 0; a number that cannot be served raises
    :class:`InvalidParameterError`.
    """
    wish = config.speculation if requested is None else requested
    if wish == "auto":
        return facts.n_draft_max
    if wish > facts.n_draft_max:
        raise InvalidParameterError("speculation", _refusal(wish, facts))
    return wish


def _refusal(wish: int, facts: ModelFacts) -> str:
    if facts.n_draft_max == 0:
        return (
            f"{wish} was asked for, but this engine cannot draft: the model has no MTP heads, or "
            f'n_draft_max is 0; use speculation=0 or "auto", or a GGUF that was converted with '
            f"its MTP (nextn) layers"
        )
    return (
        f"{wish} is deeper than n_draft_max={facts.n_draft_max}; lower it, or raise n_draft_max "
        f"when opening the engine"
    )
