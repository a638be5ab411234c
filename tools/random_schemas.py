"""Random JSON schemas, and whether answers that keep to them are valid.

usage: python tools/random_schemas.py [--count 1000] [--first 0] [--model FILE] [--speculation 3]

Every answer that ends by itself must be valid by the jsonschema package, which knows nothing of
grammars. Schemas that cannot be done are refused, and counted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import anyio
import jsonschema

import mtpbatch

Schema = dict[str, Any]

_KEYS = ("name", "age", "id", "tags", "x", "größe", 'quo"te', "a b")
_WORDS = ("red", "green", "", "naïve", 'back\\slash "and" quotes', "1")
_PATTERNS = (r"^[a-z]{1,5}$", r"^\d{2,4}$", r"^(ab|cd)+$", r"^[A-Z][a-z]*-\d$", r"x")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
_DEEPEST = 3


def random_schema(random: Random) -> Schema:
    """A schema of any kind, some of them with definitions that refer to themselves."""
    schema = _any(random, 0)
    if random.random() < 0.15:
        node = {
            "type": "object",
            "properties": {
                "value": _any(random, _DEEPEST),
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["next"],
            "additionalProperties": False,
        }
        schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    return schema


def _any(random: Random, depth: int) -> Schema:
    kinds: list[Callable[[Random, int], Schema]]
    kinds = [_string, _string, _integer, _number, _constant, _simple]
    if depth < _DEEPEST:
        kinds += [_array, _object, _object, _either, _all]
    return random.choice(kinds)(random, depth)


def _string(random: Random, _depth: int) -> Schema:
    schema: Schema = {"type": "string"}
    match random.randrange(4):
        case 0:
            schema["minLength"] = random.randrange(4)
            schema["maxLength"] = schema["minLength"] + random.randrange(12)
        case 1:
            schema["pattern"] = random.choice(_PATTERNS)
        case 2:
            schema["format"] = random.choice(_FORMATS)
        case _:
            schema["maxLength"] = random.randrange(20)
    return schema


def _integer(random: Random, _depth: int) -> Schema:
    schema: Schema = {"type": "integer"}
    low = random.randrange(-2000, 2000)
    if random.random() < 0.8:
        schema[random.choice(("minimum", "exclusiveMinimum"))] = low
    if random.random() < 0.8:
        schema[random.choice(("maximum", "exclusiveMaximum"))] = low + random.randrange(2, 5000)
    if random.random() < 0.2:
        schema["multipleOf"] = random.randrange(1, 50)
    return schema


def _number(random: Random, _depth: int) -> Schema:
    low = round(random.uniform(-100, 100), random.randrange(4))
    high = round(low + random.uniform(0.01, 200), random.randrange(3, 5))
    return {"type": "number", "minimum": low, "maximum": high}


def _constant(random: Random, _depth: int) -> Schema:
    values = [random.choice((*_WORDS, 0, -7, 2.5, True, None)) for _ in range(1, 4)]
    return {"const": values[0]} if random.random() < 0.3 else {"enum": values}


def _simple(random: Random, _depth: int) -> Schema:
    return {"type": random.choice(("boolean", "null", ["boolean", "null"]))}


def _array(random: Random, depth: int) -> Schema:
    schema: Schema = {"type": "array", "items": _any(random, depth + 1)}
    if random.random() < 0.3:
        schema["prefixItems"] = [_any(random, depth + 1) for _ in range(random.randrange(1, 3))]
    if random.random() < 0.7:
        schema["minItems"] = random.randrange(3)
    schema["maxItems"] = schema.get("minItems", 0) + random.randrange(4)
    return schema


def _object(random: Random, depth: int) -> Schema:
    keys = random.sample(_KEYS, random.randrange(5))
    schema: Schema = {
        "type": "object",
        "properties": {key: _any(random, depth + 1) for key in keys},
        "required": random.sample(keys, random.randrange(len(keys) + 1)),
    }
    match random.randrange(4):
        case 0:
            schema["additionalProperties"] = _any(random, _DEEPEST)
        case 1:
            pass  # any others
        case _:
            schema["additionalProperties"] = False
    return schema


def _either(random: Random, depth: int) -> Schema:
    schemas = [_any(random, depth + 1) for _ in range(random.randrange(2, 4))]
    return {random.choice(("anyOf", "anyOf", "oneOf")): schemas}


def _all(random: Random, depth: int) -> Schema:
    base = _any(random, depth + 1)
    return {"allOf": [base, {"title": "no limit"}]}


def is_valid(text: str, schema: Schema) -> bool:
    """Whether a text is JSON that a schema allows, formats included."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


async def check(engine: mtpbatch.Engine, seeds: range, **params: Any) -> Counter[str]:
    """How answers to these schemas ended. Raises AssertionError for one that is not valid."""
    counts: Counter[str] = Counter()
    todo = iter(seeds)

    async def work() -> None:
        for seed in todo:
            schema = random_schema(Random(seed))
            try:
                done = await engine.generate("JSON: ", json_schema=schema, seed=seed, **params)
            except mtpbatch.InvalidParameterError:
                counts["refused"] += 1
                continue
            counts[done.finish_reason] += 1
            if done.finish_reason == "stop" and not is_valid(done.text, schema):
                raise AssertionError(f"seed {seed}: {done.text!r} is not valid by {schema}")

    async with anyio.create_task_group() as group:
        for _ in range(engine.config.n_seq):
            group.start_soon(work)
    return counts


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--speculation", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=150)
    args = parser.parse_args()
    async with mtpbatch.Engine.open(args.model, n_seq=8, n_ctx=512) as engine:
        counts = await check(
            engine,
            range(args.first, args.first + args.count),
            max_tokens=args.max_tokens,
            temperature=1.0,
            speculation=args.speculation,
        )
    print(f"{args.count} schemas, speculation={args.speculation}: {dict(counts)}; all valid")


if __name__ == "__main__":
    anyio.run(main)
