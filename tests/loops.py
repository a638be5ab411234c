"""Generation loops written out on Context and MtpSession, for comparison with what is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mtpbatch.backend import Backend
from mtpbatch.native import Batch, Context, DraftRequest, Executor, MtpSession
from mtpbatch.types import Plan, StepResult


@dataclass(slots=True)
class Stream:
    """What one sequence generated."""

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def execute(executor: Executor | Backend, plan: Plan) -> StepResult:
    """Run a plan of a single step, and wait for it."""
    if not plan.entries:
        assert executor.exchange(plan, wait=False) == []
        return StepResult(plan.number, (), 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    [result] = executor.exchange(plan, wait=True)
    if result.error:
        raise result.error
    return result


def best(context: Context, row: int) -> int:
    """The likeliest token after a row of the last batch."""
    return int(context.logits(row).argmax())


def feed(
    context: Context, seq_id: int, tokens: Sequence[int], session: MtpSession | None = None
) -> int:
    """Decode tokens in chunks of n_batch; return the last one's row."""
    row = -1
    for start in range(0, len(tokens), context.n_batch):
        batch = Batch()
        chunk = tokens[start : start + context.n_batch]
        row = batch.add_sequence(chunk, context.length(seq_id), seq_id)[-1]
        context.decode(batch)
        if session:
            session.process(batch)
    return row


def greedy(context: Context, seq_id: int, prompt: Sequence[int], count: int) -> list[int]:
    """Continue a prompt by ``count`` of the likeliest tokens, one decode each."""
    tokens = [best(context, feed(context, seq_id, prompt))]
    while len(tokens) < count:
        tokens.append(best(context, feed(context, seq_id, tokens[-1:])))
    return tokens


def drafted(
    target: Context,
    session: MtpSession,
    prompts: Mapping[int, Sequence[int]],
    count: int,
    depth: Callable[[int, int], int],
) -> dict[int, Stream]:
    """Continue prompts, by sequence id, side by side with drafts.

    ``depth(seq_id, step)`` says how deep a sequence drafts; never past the end of what is wanted.
    """
    streams = {}
    for seq_id, prompt in prompts.items():
        row = feed(target, seq_id, prompt, session)
        streams[seq_id] = Stream([best(target, row)])
    step = 0
    while active := [s for s in streams if len(streams[s].tokens) < count]:
        requests = [
            DraftRequest(
                s,
                target.length(s),
                streams[s].tokens[-1],
                min(depth(s, step), count - len(streams[s].tokens) - 1),
            )
            for s in active
        ]
        drafts = dict(zip(active, session.draft_many(requests), strict=True))
        verify(target, session, streams, drafts)
        step += 1
    return streams


def verify(
    target: Context,
    session: MtpSession,
    streams: Mapping[int, Stream],
    drafts: Mapping[int, list[int]],
) -> None:
    """Decode the last token and the draft of each sequence, and see what follows from it.

    One decode for each run of neighbours with equally long drafts: of more than that, a model
    with recurrent layers cannot take back what is rejected.
    """
    run: dict[int, list[int]] = {}
    for s in sorted(drafts, key=lambda s: (len(drafts[s]), s)):
        if run and (s - 1 not in run or len(run[s - 1]) != len(drafts[s])):
            _verify(target, session, streams, run)
            run = {}
        run[s] = drafts[s]
    _verify(target, session, streams, run)


def _verify(
    target: Context,
    session: MtpSession,
    streams: Mapping[int, Stream],
    drafts: Mapping[int, list[int]],
) -> None:
    batch = Batch()
    rows = {
        s: batch.add_sequence([streams[s].tokens[-1], *draft], target.length(s), s, outputs="all")
        for s, draft in drafts.items()
    }
    target.decode(batch)
    session.process(batch)
    for s, draft in drafts.items():
        stream, hits = streams[s], 0
        while True:
            token = best(target, rows[s][hits])
            stream.tokens.append(token)
            if hits == len(draft) or draft[hits] != token:
                break
            hits += 1
        stream.drafted += len(draft)
        stream.accepted += hits
        if draft:
            session.accept(s, hits)
            target.truncate(s, target.length(s) - (len(draft) - hits))
