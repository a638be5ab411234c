"""Names and values that no request and no engine has."""

import mtpbatch
from mtpbatch import Engine


async def main(engine: Engine) -> None:
    await engine.generate("x", max_tokns=4)  # expect error
    await engine.generate("x", temperature="hot")  # expect error
    await engine.generate("x", stop=7)  # expect error
    await engine.generate("x", seed="lucky")  # expect error
    await engine.generate("x", speculation="deep")  # expect error
    await engine.generate_many("x", 3)  # expect error
    engine.submit("x", follow=False)  # expect error
    Engine.open("model.gguf", n_sequences=4)  # expect error
    Engine.open("model.gguf", kv_type="f64")  # expect error
    Engine.open("model.gguf", on_full="drop")  # expect error
    options: mtpbatch.SamplingOptions = {"temperatur": 1.0}  # expect error
    print(options)
