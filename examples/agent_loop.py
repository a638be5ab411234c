"""Agents that call tools: each step is JSON of a schema, so that each call can be made.

    pip install '.[structured]'     # llguidance
    python examples/agent_loop.py

The demo model cannot reason: it calls tools with arguments as good as random, and its answers mean
nothing. What holds with it holds with every model: each call is valid, and the loop ends. A real
model chooses better: put its path in below.
"""

import asyncio
from typing import Annotated, Any, Literal

import msgspec

import mtpbatch

MODEL = None  # the path of a GGUF file; None is the demo model in the package
MAX_STEPS = 5
QUESTIONS = ["Should I take an umbrella in Oslo?", "How much is 6 times 7?", "Is Cairo warm?"]

Number = Annotated[int, msgspec.Meta(ge=-999, le=999)]


# A tool is a type whose fields are its arguments, with the tightest types that are right: what the
# schema rules out, no model can do. Docstrings become descriptions in the schema.
class Weather(msgspec.Struct, tag_field="tool", tag="weather", forbid_unknown_fields=True):
    """Today's weather in a city."""

    city: Literal["Cairo", "Lima", "Oslo"]

    async def run(self) -> str:
        return {"Cairo": "sun, 35 °C", "Lima": "clouds, 19 °C", "Oslo": "rain, 8 °C"}[self.city]


class Multiply(msgspec.Struct, tag_field="tool", tag="multiply", forbid_unknown_fields=True):
    """The product of two numbers."""

    a: Number
    b: Number

    async def run(self) -> str:
        return str(self.a * self.b)


class Answer(msgspec.Struct, tag_field="tool", tag="answer", forbid_unknown_fields=True):
    """The answer for the user: ends the work."""

    # Bounded: a model that rambles comes to the end of its answer before that of its tokens.
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=60)]


Step = Weather | Multiply | Answer
SYSTEM = (
    "Work on the user's question step by step. Each step is a JSON object of this schema: "
    + msgspec.json.encode(msgspec.json.schema(Step)).decode()
)


async def agent(engine: mtpbatch.Engine, question: str, seed: int) -> str:
    """Work on a question until there is an answer."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
    ]
    for n in range(1, MAX_STEPS + 1):
        form: Any = Step if n < MAX_STEPS else Answer  # the last step can be nothing else
        done = await engine.chat(
            messages, json_schema=form, max_tokens=1000, temperature=0.7, seed=seed + n
        )
        if done.finish_reason != "stop":
            # Cut off by max_tokens or the context: not JSON then. Only a "stop" is whole.
            return f"(no answer: {done.finish_reason})"
        step = msgspec.json.decode(done.content, type=form)
        if isinstance(step, Answer):
            return step.text
        result = await step.run()
        print(f"{question} -> {step} = {result}")
        messages.append({"role": "assistant", "content": done.content})
        messages.append({"role": "tool", "name": type(step).__name__, "content": result})
    raise AssertionError("the last step is an answer")


async def main() -> None:
    async with mtpbatch.Engine.open(MODEL, n_seq=4) as engine:
        # All agents share each step of the model, and the system prompt is computed once.
        answers = await asyncio.gather(
            *(agent(engine, question, seed=10 * i) for i, question in enumerate(QUESTIONS))
        )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} -> {answer!r}")


if __name__ == "__main__":
    asyncio.run(main())
