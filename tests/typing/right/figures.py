"""Figures of an engine, its health, and somebody who watches."""

import mtpbatch
from mtpbatch import EngineStats, RequestEnded, StepReport, Watcher


class Counting(Watcher):
    def __init__(self) -> None:
        self.tokens = 0
        self.by_reason: dict[str, int] = {}

    def stepped(self, report: StepReport) -> None:
        self.tokens += sum(sequence.n_generated for sequence in report.sequences)

    def ended(self, request: RequestEnded) -> None:
        reason = "error" if request.completion is None else request.completion.finish_reason
        self.by_reason[reason] = self.by_reason.get(reason, 0) + 1


async def watch(engine: mtpbatch.Engine) -> float:
    counting = Counting()
    with engine.watch(counting):
        await engine.generate("x")
    stats: EngineStats = engine.stats()
    by_depth = zip(stats.accepted_by_depth, stats.drafted_by_depth, strict=True)
    print([accepted / drafted for accepted, drafted in by_depth], stats.finished["stop"])
    try:
        engine.check_health(stall_timeout=5)
    except mtpbatch.EngineStalledError as error:
        print(error.seconds, error.n_requests)
    return stats.acceptance or 0.0
