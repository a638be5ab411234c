"""Answers that keep to a form."""

from typing import Literal

import msgspec

import mtpbatch


class Weather(msgspec.Struct):
    city: str
    degrees: float
    sky: Literal["clear", "cloudy"]


async def weather(engine: mtpbatch.Engine, text: str) -> Weather:
    done = await engine.generate(text, json_schema=Weather, max_tokens=100)
    return msgspec.json.decode(done.text, type=Weather)


async def sort(engine: mtpbatch.Engine, text: str) -> bool:
    done = await engine.generate(text, choice=["yes", "no"])
    digits = await engine.generate(text, regex="[0-9]{4}")
    try:
        await engine.generate(text, grammar="start: /[a-z]+/")
    except mtpbatch.InvalidParameterError as error:
        print(error.parameter)
    return done.text == "yes" and int(digits.text) > 0
