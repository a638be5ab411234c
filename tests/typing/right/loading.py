"""How an engine comes and goes: progress, errors, logs, another thread."""

import threading

import anyio

import mtpbatch

shares: list[float] = []


async def serve(path: str, stop: anyio.Event) -> None:
    mtpbatch.log_to_console("INFO")
    try:
        async with mtpbatch.Engine.open(path, progress=shares.append, lora={"a.gguf": 1}) as engine:
            with anyio.CancelScope() as scope:
                await stop.wait()
            assert not scope.cancel_called
            await engine.aclose(timeout=5)
            await engine.wait_closed()
    except (mtpbatch.ModelLoadError, mtpbatch.ContextError) as error:
        raise SystemExit(str(error)) from None
    except mtpbatch.NativeDiedError as died:
        print(died.returncode)


threading.Thread(target=anyio.run, args=(serve, "model.gguf", anyio.Event())).start()
