"""What results are not."""

from mtpbatch import Completion, Engine


async def main(engine: Engine) -> str:
    done = engine.generate("x")
    print(done.text)  # expect error
    completion: Completion = await engine.generate("x")
    completion.text = "y"  # expect error
    if completion.finish_reason == "stopped":  # expect error
        return ""
    print(completion.reason)  # expect error
    async with engine.stream("x") as deltas:
        list(deltas)  # expect error
        print(deltas.completion.text)  # expect error
    share: float = engine.stats().acceptance  # expect error
    return completion.logprobs[0].token_id + share  # expect error
