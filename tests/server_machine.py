"""A state machine over the server: clients come, read slowly, leave or run out of time; the engine
fails, hangs and ends.

The app is called as a server calls it, without one; the engine below goes on only where a rule says
so (see ``lockstep``).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lockstep import Garbage, LockstepBackend, close_all, let_run
from mtpbatch import Engine
from mtpbatch.server import create_app
from scheduling import make_sequence, undrafted

N_CTX = 32
STALL_TIMEOUT = 60.0
MOST_TURNS = 5000  # after which an engine that is still not idle never will be
_LOOKS = 20  # of the loop: a request passes several task groups


class Client:
    """One request over HTTP, as the server has it."""

    def __init__(self, prompt: str, asked: dict[str, Any], *, reads: bool) -> None:
        self.prompt = prompt
        self.n = int(asked["n"])
        self.max_tokens = int(asked["max_tokens"])
        self.streams = bool(asked["stream"])
        self.may_be_cut = bool(asked.get("timeout") or asked.get("queue_timeout"))
        self.body = json.dumps(asked | {"prompt": prompt, "ignore_eos": True}).encode()
        self.left = asyncio.Event()
        self.reading = asyncio.Event()
        if reads:
            self.reading.set()
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.answer = b""
        self.ended = False
        self.endangered = False  # whether it was there while something was to go wrong
        self.violations: list[str] = []
        self._sent = False
        self.task: asyncio.Task[None]

    scope: ClassVar[dict[str, Any]] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }

    async def receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if self.status is not None:
                self.violations.append("an answer begins twice")
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        if self.status is None or self.ended:
            self.violations.append(f"{message} out of turn")
        self.answer += message.get("body", b"")
        self.ended = not message.get("more_body", False)
        if not self.ended:
            await self.reading.wait()  # the connection takes no more

    def texts(self) -> tuple[list[str], set[int], bool]:
        """What it has been told of each answer, whose time was over, and whether an error ended
        that. Each answer that no error ends has ended once, and nothing of it comes after that."""
        texts, cut, ended = [""] * self.n, set(), [False] * self.n
        told = self.events() if self.streams else [json.loads(self.answer)]
        for choice in [choice for one in told for choice in one.get("choices", ())]:
            i = choice["index"]
            assert not ended[i], "an answer goes on after its end"
            texts[i] += choice["text"]
            ended[i] = choice["finish_reason"] is not None
            if choice["stop_reason"] == "timeout":
                cut.add(i)
        failed = any("error" in one for one in told)
        assert failed or all(ended), "an answer has no end"
        return texts, cut, failed

    def events(self) -> list[dict[str, Any]]:
        """Those of a stream. The last one says that all went well, or what did not."""
        *data, rest = self.answer.decode().split("\n\n")
        assert not rest, "an event is cut off"
        all_went_well = data[-1] == "data: [DONE]"
        told = [json.loads(one.removeprefix("data: ")) for one in data[: len(data) - all_went_well]]
        failures = ["error" in one for one in told]
        assert failures.count(True) == failures[-1:].count(True) == (not all_went_well)
        return told


class ServerMachine(RuleBasedStateMachine):
    """Every client that stays gets an answer, and who leaves leaves nothing behind."""

    @initialize(
        n_seq=st.integers(1, 4),
        lag=st.sampled_from([0, 1, 4]),
        max_waiting=st.sampled_from([0, 2, None]),
        on_full=st.sampled_from(["wait", "reject"]),
        n_cells=st.sampled_from([None, 40]),
        n_draft_max=st.integers(0, 3),
        acceptance=st.sampled_from([0.0, 0.6, 1.0]),
        may_end=st.sampled_from([False, False, True]),
    )
    def open(self, n_seq: int, n_cells: int | None, may_end: bool, **model: Any) -> None:
        self.backend = LockstepBackend(
            n_seq=n_seq,
            n_ctx=N_CTX,
            n_cells=None if n_cells is None else min(n_cells, N_CTX * n_seq),
            **model,
        )
        self.clients: list[Client] = []
        self.may_end = may_end
        self.enders: list[asyncio.Task[None]] = []
        self.violations: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.violations.append(str(context)))
        self.engine = Engine(lambda: self.backend, self.backend.clock)
        self.backend.await_halt()
        self.garbage = Garbage(self.engine)
        self.backend.garble = self.garbage.garble
        self.app = create_app(self.engine, stall_timeout=STALL_TIMEOUT)

    def run(self) -> None:
        let_run(self.loop, _LOOKS)

    def turn(self) -> None:
        """Let the engine go on, until it is in the next native call."""
        n_asked = sum(client.n for client in self.present())
        self.backend.turn()
        assert len(self.engine._intake.live) <= n_asked, "who is gone has nothing in the engine"
        assert self.engine._intake.until_timeout() != 0.0, "nobody outlasts its time"

    def endanger(self) -> None:
        """What is done may cost whoever is there their answers."""
        for client in self.present():
            client.endangered = True

    def present(self) -> list[Client]:
        return [client for client in self.clients if not client.task.done()]

    @rule(
        stream=st.booleans(),
        n=st.integers(1, 3),
        max_tokens=st.integers(1, 20),
        letters=st.text("xyz", min_size=1, max_size=8),
        timeout=st.sampled_from([None, None, 0.03, 0.3]),
        queue_timeout=st.sampled_from([None, None, 0.005, 0.05]),
        reads=st.sampled_from([True, True, False]),
    )
    def ask(self, letters: str, reads: bool, **asked: Any) -> None:
        client = Client(letters, asked, reads=reads)
        client.task = self.loop.create_task(self.app(client.scope, client.receive, client.send))
        self.clients.append(client)
        self.run()
        if self.engine.closed or self.engine.draining:
            too_many = client.n > self.backend.config.n_seq  # ever, which is said first
            assert client.status == 503 or (client.status == 400 and too_many)

    @rule()
    def crowd(self) -> None:
        for i in range(6):
            self.ask("xyz"[: 1 + i % 3], True, stream=i % 2 == 0, n=1, max_tokens=6)

    @precondition(lambda self: bool(self.present()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Whoever leaves has nothing in the engine once the step under way has ended."""
        client = data.draw(st.sampled_from(self.present()))
        client.left.set()
        self.run()
        self.turn()
        self.run()
        assert client.task.done()

    @precondition(lambda self: bool(self.present()))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.present())).reading.set()
        self.run()

    @rule(n=st.integers(1, 16))
    def go_on(self, n: int) -> None:
        for _ in range(n):
            self.turn()
            self.run()

    @precondition(lambda self: bool(self.present()))
    @rule(seconds=st.sampled_from([0.001, 0.02, 0.3, 100.0]))
    def time_passes(self, seconds: float) -> None:
        """In the middle of a native call, which may hang for so long."""
        self.backend.clock.advance(seconds)

    @rule()
    def look_at_health(self) -> None:
        """A probe is answered whatever the engine does, and notices a step that does not come
        back."""
        engine = self.engine
        since = max(engine._last_step, engine._intake.busy_since)
        hangs = self.backend.clock() - since > STALL_TIMEOUT and engine._intake.n_ready > 0
        gone = engine.closed or engine.draining or engine._death is not None
        probe = Client("", {"n": 1, "max_tokens": 1, "stream": False}, reads=True)
        scope = probe.scope | {"method": "GET", "path": "/health", "raw_path": b"/health"}
        self.loop.create_task(self.app(scope, probe.receive, probe.send))
        self.run()
        assert probe.ended
        assert probe.status == (503 if hangs or gone else 200)

    @rule(n=st.integers(1, 16))
    def the_loop_is_busy(self, n: int) -> None:
        for _ in range(n):
            self.turn()

    @precondition(lambda self: bool(self.present()))
    @rule(how=st.sampled_from(["fail", "die"]))
    def fail_a_step(self, how: str) -> None:
        if how == "fail":
            self.backend.fail_step(self.backend.n_steps)
        else:
            self.backend.die_in_step(self.backend.n_steps)

    @precondition(lambda self: bool(self.present()))
    @rule(kind=st.sampled_from(Garbage.KINDS))
    def garble_a_result(self, kind: str) -> None:
        self.garbage.add(kind)

    @precondition(lambda self: self.may_end)
    @rule(how=st.sampled_from(["drain", "drain now", "close", "crash"]))
    def end_engine(self, how: str) -> None:
        if how != "drain":
            self.endanger()
        if how == "crash":
            self.backend.fail_step(self.backend.n_steps, RuntimeError("scripted crash"))
            return
        if self.engine.closed:
            return
        end = (
            self.engine.aclose(3600)
            if how == "close"
            else self.engine.drain(0 if how == "drain now" else None)
        )
        self.enders.append(self.loop.create_task(end))
        self.run()

    @invariant()
    def nobody_is_forgotten(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert not self.violations
        if self.backend.will_fail or self.garbage.is_coming or self.engine._death is not None:
            self.endanger()
        if self.engine._gate.failure is None:
            self.engine._scheduler.check_integrity()
        if self.backend.at_rest and self.engine._death is None:
            assert not self.engine._intake.n_ready, "nothing waits without a reason"
        for client in self.clients:
            assert not client.violations
            if client.task.done():
                client.task.result()
                assert client.ended or client.left.is_set(), "who stays gets an answer"

    @rule()
    def settle(self) -> None:
        """Nobody waits without a reason: of an engine that is left alone everybody hears."""
        for _ in range(MOST_TURNS):
            for client in self.clients:
                client.reading.set()
            self.run()
            self.turn()
            if self.engine._death is not None and not self.backend.closed:
                self.backend.clock.advance(100.0)
            elif self.backend.closed or self.backend.at_rest:
                break
        else:
            raise AssertionError(f"it does not come to rest: {self.engine!r}")
        self.run()
        assert not self.present()
        assert not self.engine._intake.live
        if not self.engine.closed:
            assert not self.backend.active, "the executor was told of every release"
            assert not self.backend.parked, "and of every parked request that ended"
            assert self.backend.snapshots == set(self.engine._scheduler._snapshots._cached)
            assert self.engine.stats().kv_cells_used == 0

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.settle()
            self.nobody_is_forgotten()
            for client in self.clients:
                self.check_answer(client)
        finally:
            close_all(self.engine, self.backend, [self.loop])

    def check_answer(self, client: Client) -> None:
        if client.left.is_set() and not client.ended:
            return
        allowed = {200, 400} | ({500, 503} if client.endangered else set())
        allowed |= {503} if self.engine.closed or self.enders else set()
        allowed |= {429} if self.backend.config.max_waiting is not None else set()
        assert client.status in allowed
        if client.status != 200:
            assert json.loads(client.answer)["error"]["message"]
            assert (client.status == 429) <= (int(client.headers.get(b"retry-after", 0)) > 0)
            if client.status == 400 and not (
                client.endangered and b"by its grammar" in client.answer
            ):
                # more answers at once than there is ever room for
                assert client.n > self.backend.config.n_seq
            return
        prompt = self.backend.tokenize(client.prompt)
        truth = make_sequence(
            self.backend, "truth", prompt, max_tokens=client.max_tokens, ignore_eos=True
        )
        _, right, _ = undrafted(self.backend, truth)
        texts, cut, failed = client.texts()
        assert client.endangered or not failed
        assert client.may_be_cut or not cut
        for i, text in enumerate(texts):
            if failed or i in cut:
                assert right.startswith(text.rstrip("\ufffd")), "perhaps half a character is last"
            else:
                assert text == right
