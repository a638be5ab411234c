"""The live page in Chromium, on a real server with the demo model, and its stream over HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import httpx
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config, Server

import mtpbatch
from browsing import console_errors, open_browser, requested, set_screen
from mtpbatch.server.page import OPEN_PATHS, routes, web
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from patience import until

WIDTHS = [pytest.param(390, id="phone"), pytest.param(1280, id="desktop")]
PATIENCE = 60.0  # seconds; this is for machines that are busy

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Served:
    """An engine, and its page on a server, on an event loop in a thread of their own."""

    def __init__(self, engine: Any, port: int, wrap: Callable[[ASGIApp], ASGIApp]) -> None:
        self._opening = engine
        self._wrap = wrap
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(port),))
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _serve(self, port: int) -> None:
        self.loop = asyncio.get_running_loop()
        async with self._opening as self.engine:
            app = self._wrap(Starlette(routes=routes(self.engine)))
            self.server = Server(Config(app, port=port, log_level="error", lifespan="off"))
            with socket.create_server(("127.0.0.1", port)) as listening:
                self.port = listening.getsockname()[1]
                self.address = f"http://127.0.0.1:{self.port}/"
                self._ready.set()
                await self.server.serve([listening])

    def run(self, call: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Await something on the server's loop."""

        async def here() -> _T:
            return await call(*args, **kwargs)

        return asyncio.run_coroutine_threadsafe(here(), self.loop).result(PATIENCE)

    def stop(self) -> None:
        """As SIGTERM does: open connections may end."""
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextmanager
def served(
    engine: Any, port: int = 0, wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> Iterator[Served]:
    running = Served(engine, port, wrap)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chrome]:
    if shutil.which("chromedriver") is None and shutil.which("apt-get") is None:
        pytest.skip("NOT TESTED: the live page, as there is neither chromium nor apt-get here")
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """The same one for all tests, which it leaves no page of."""
    set_screen(chromium, 1280, 800)
    chromium.get("about:blank")
    requested(chromium), console_errors(chromium)
    yield chromium
    chromium.get("about:blank")


def demo(**config: Any) -> Any:
    return mtpbatch.Engine.open(**{"n_seq": 3, "n_ctx": 512, "speculation": 3} | config)


def wait(browser: Chrome, condition: Callable[[], object]) -> None:
    WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())


def text(browser: Chrome, css: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, css).text)


def state(browser: Chrome) -> str:
    return str(browser.find_element(By.ID, "state").get_attribute("data-state"))


def table(browser: Chrome, section: str) -> list[list[str]]:
    """Its cells, row by row."""
    found: list[list[str]] = browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))",
        section,
    )
    return found


def painted(browser: Chrome, n_lanes: int) -> list[set[str]]:
    """What is seen in each lane of the canvas, of what the legend names."""
    found: list[list[str]] = browser.execute_script(
        """
        const canvas = document.querySelector("#lanes canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const words = new Uint32Array(data.data.buffer);
        const probe = document.createElement("canvas").getContext("2d");
        const colours = {};
        for (const item of document.querySelectorAll("#legend li")) {
          probe.clearRect(0, 0, 1, 1);
          probe.fillStyle = getComputedStyle(item, "::before").backgroundColor;
          probe.fillRect(0, 0, 1, 1);
          const pixel = new Uint32Array(probe.getImageData(0, 0, 1, 1).data.buffer)[0];
          if (pixel) colours[pixel] = item.className;
        }
        const lane = ((canvas.height - 18 * devicePixelRatio) / arguments[0]) * canvas.width;
        return Array.from({ length: arguments[0] }, (_, seq) => [...new Set(
          Array.from(words.subarray(seq * lane, (seq + 1) * lane), (word) => colours[word])
        )].filter(Boolean));
        """,
        n_lanes,
    )
    return [set(names) for names in found]


def number(value: float) -> str:
    return f"{value:,.0f}"


def percent(part: int, whole: int) -> str:
    # As a browser rounds: half up.
    return f"{int(100 * part / whole + 0.5)} %" if whole else "\N{EN DASH}"


# ------------------------------------------------------------------------------ in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_shows_what_the_engine_does(browser: Chrome, width: int, scheme: Any) -> None:
    set_screen(browser, width, 844, scheme=scheme, scale=3 if width == 390 else 1)
    with served(demo()) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        assert painted(browser, 3) == [set()] * 3
        prompts = [
            "In the beginning God created the heaven and the earth. " * 2 + str(i) for i in range(7)
        ]
        server.run(server.engine.generate_many, prompts, max_tokens=100, ignore_eos=True)
        seen = {"prompt", "sampled", "accepted", "rejected", "boundary"}
        wait(browser, lambda: all(seen <= lane for lane in painted(browser, 3)))

        stats = server.engine.stats()
        assert stats.generated_tokens == 7 * 100
        wait(browser, lambda: text(browser, "#totals").startswith("700 tokens"))
        assert text(browser, "#totals") == (
            f"700 tokens generated in {number(stats.steps)} steps. "
            f"{number(stats.prompt_tokens)} tokens of prompts computed, "
            f"{number(stats.prefix_hits)} reused."
        )
        wait(browser, lambda: text(browser, "#running") == "0")
        assert text(browser, "#waiting") == "0"
        assert text(browser, "#cells") == "0"
        assert text(browser, "#cells-more") == f"of {number(stats.n_cells)}"
        assert text(browser, "#snapshots") == f"{stats.snapshot_bytes / 2**20:.1f}"
        assert stats.tokens_per_step is not None
        assert abs(float(text(browser, "#gain-more").split()[0]) - stats.tokens_per_step) <= 0.006
        depths = zip(stats.accepted_by_depth, stats.drafted_by_depth, strict=True)
        assert [(row[0], row[3]) for row in table(browser, "acceptance")] == [
            (str(depth), percent(*counts)) for depth, counts in enumerate(depths, 1)
        ]
        ended = {row[0]: row[2] for row in table(browser, "ended")}
        assert ended == {reason: str(count) for reason, count in stats.finished.items()}
        assert ended["length"] == "7"
        overflow = (
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert browser.execute_script(overflow) == 0
        browser.get("about:blank")
    assert console_errors(browser) == []
    urls = [url for url in requested(browser) if urlsplit(url).netloc]
    assert {urlsplit(url).netloc for url in urls} == {f"127.0.0.1:{server.port}"}
    paths = {urlsplit(url).path for url in urls}
    assert paths == {*OPEN_PATHS, "/live/events"}


def test_the_page_finds_a_server_that_was_started_again(browser: Chrome) -> None:
    with served(demo()) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        server.run(server.engine.generate, "In the beginning", max_tokens=200, ignore_eos=True)
        wait(browser, lambda: "accepted" in painted(browser, 3)[0])
        wait(browser, lambda: text(browser, "#totals").startswith("200 tokens"))
        server.run(server.engine.drain)
    wait(browser, lambda: state(browser) == "lost")
    assert text(browser, "#state") == "No connection, trying again"
    with served(demo(n_seq=2), port=server.port) as server:
        wait(browser, lambda: state(browser) == "serving")
        wait(browser, lambda: text(browser, "#running-more") == "of 2 sequences")
        assert painted(browser, 2) == [set()] * 2
        server.run(server.engine.generate, "In the beginning", max_tokens=300, ignore_eos=True)
        wait(browser, lambda: "accepted" in painted(browser, 2)[0])
        wait(browser, lambda: text(browser, "#totals").startswith("300 tokens"))
        browser.get("about:blank")
    # A browser complains by itself of what it cannot reach; the page does not.
    assert [e for e in console_errors(browser) if "ERR_CONNECTION_REFUSED" not in e] == []


def test_one_stream_follows_another_and_nobody_sees_it(
    browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_LONGEST_STREAM", 0.3)
    with served(demo(n_seq=1)) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        browser.execute_script(
            """
            window.states = [];
            const states = new MutationObserver(() => window.states.push(state.dataset.state));
            const state = document.getElementById("state");
            states.observe(state, { attributes: true });
            """
        )
        server.run(server.engine.generate, "In the beginning", max_tokens=200, ignore_eos=True)
        wait(browser, lambda: "accepted" in painted(browser, 1)[0])
        streams: list[str] = []

        def opened_four() -> bool:
            streams.extend(url for url in requested(browser) if url.endswith("events"))
            return len(streams) >= 4

        wait(browser, opened_four)
        assert "accepted" in painted(browser, 1)[0], "what was there goes on"
        assert set(browser.execute_script("return window.states")) == {"serving"}
        browser.get("about:blank")
    assert console_errors(browser) == []


def test_what_runs_when_the_page_comes_is_shown(browser: Chrome) -> None:
    backend = ScriptedBackend(n_seq=2, n_ctx=400, n_draft_max=0)
    held = backend.hold_step(5)
    with served(open_scripted_engine(backend)) as server:
        request = server.run(submitted, server.engine)
        server.run(held.reached)
        browser.get(server.address)
        wait(browser, lambda: text(browser, "#running") == "1")
        summary = browser.find_element(By.CSS_SELECTOR, "#lane-table summary")
        summary.send_keys(Keys.ENTER)
        wait(browser, lambda: len(table(browser, "lane-table")) == 2)
        row = table(browser, "lane-table")[0]
        assert row[:2] == ["0", request.request_id]
        assert row[3:5] == ["17", "0"]
        assert table(browser, "lane-table")[1][2] == "idle"
        assert "This engine drafts nothing" in text(browser, "#acceptance")
        held.release()
        server.run(request._result)
        wait(browser, lambda: table(browser, "lane-table")[0][2] == "idle")
        browser.get("about:blank")
    assert console_errors(browser) == []


async def submitted(engine: mtpbatch.Engine) -> mtpbatch.Generation:
    return engine.submit([65] * 17, max_tokens=300, ignore_eos=True)


def test_the_page_says_when_an_engine_drains_and_when_it_has_died(browser: Chrome) -> None:
    backend = ScriptedBackend(n_seq=1, n_ctx=400)
    held = backend.hold_step(2)
    with served(open_scripted_engine(backend)) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        request = server.run(submitted, server.engine)
        server.run(held.reached)
        draining = asyncio.run_coroutine_threadsafe(server.engine.drain(), server.loop)
        wait(browser, lambda: state(browser) == "draining")
        assert text(browser, "#state") == "Draining: no new requests"
        backend.fail_step(3, RuntimeError("the secret of a library"))
        held.release()
        with pytest.raises(mtpbatch.EngineDeadError):
            server.run(request._result)
        draining.result(PATIENCE)
        wait(browser, lambda: state(browser) == "dead")
        assert text(browser, "#state") == "The engine has died"
        assert "secret" not in browser.page_source
        browser.get("about:blank")
    assert console_errors(browser) == []


class Locked:
    """An app that asks for a key, but for the page's files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Request(scope).headers.get("authorization")
        if scope["path"] in OPEN_PATHS or key == "Bearer sesame":
            await self._app(scope, receive, send)
        else:
            await Response(status_code=401)(scope, receive, send)


def test_the_page_asks_for_the_key_once(browser: Chrome) -> None:
    with served(open_scripted_engine(ScriptedBackend()), wrap=Locked) as server:
        browser.get(server.address)
        field = browser.find_element(By.ID, "key-input")
        wait(browser, field.is_displayed)
        field.send_keys("sesam", Keys.ENTER)
        wait(browser, lambda: "does not accept" in text(browser, "#key"))
        field.clear()
        field.send_keys("sesame", Keys.ENTER)
        wait(browser, lambda: state(browser) == "serving")
        assert not field.is_displayed()
        browser.refresh()
        wait(browser, lambda: state(browser) == "serving")
        browser.get("about:blank")
    assert not [e for e in console_errors(browser) if "401" not in e]
    assert not [url for url in requested(browser) if "sesame" in url]


def test_a_page_that_is_paused_stands_still_and_goes_on_from_now(browser: Chrome) -> None:
    look = 'return document.querySelector("#lanes canvas").toDataURL()'
    with served(demo(n_seq=1)) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        button = browser.find_element(By.ID, "pause")
        button.send_keys(Keys.SPACE)
        assert button.text == "Go on"
        before = browser.execute_script(look)
        server.run(server.engine.generate, "In the beginning", max_tokens=200, ignore_eos=True)
        wait(browser, lambda: text(browser, "#totals").startswith("200 tokens"))
        assert browser.execute_script(look) == before
        button.click()
        wait(browser, lambda: "sampled" in painted(browser, 1)[0])
        assert button.text == "Pause"
        browser.get("about:blank")
    assert console_errors(browser) == []


@pytest.mark.parametrize("calm", [False, True])
def test_who_wants_no_motion_gets_a_new_picture_each_second(browser: Chrome, calm: bool) -> None:
    set_screen(browser, 1280, 800, calm=calm)
    with served(demo(n_seq=1)) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        drawn, seconds = browser.execute_async_script(
            """
            const done = arguments[0];
            const draw = CanvasRenderingContext2D.prototype.drawImage;
            let drawn = 0;
            CanvasRenderingContext2D.prototype.drawImage = function (...how) {
              drawn += 1;
              return draw.apply(this, how);
            };
            const begin = performance.now();
            let frames = 0;
            requestAnimationFrame(function count(now) {
              if (frames++ < 90) requestAnimationFrame(count);
              else done([drawn, (now - begin) / 1000]);
            });
            """
        )
        # In one or two parts each.
        assert drawn <= 2 * (seconds + 2) if calm else drawn >= 80
        browser.get("about:blank")


def test_what_a_block_is_can_be_asked_for(browser: Chrome) -> None:
    with served(demo(n_seq=1)) as server:
        browser.get(server.address)
        wait(browser, lambda: state(browser) == "serving")
        server.run(server.engine.generate, "In the beginning", max_tokens=200, ignore_eos=True)
        wait(browser, lambda: "sampled" in painted(browser, 1)[0])
        browser.find_element(By.ID, "pause").click()
        found = browser.execute_script(
            """
            const canvas = document.querySelector("#lanes canvas");
            const place = canvas.getBoundingClientRect();
            const texts = new Set();
            for (let x = place.left; x < place.right; x++) {
              const where = { clientX: x, clientY: place.top + 5, bubbles: true };
              canvas.dispatchEvent(new PointerEvent("pointermove", where));
              const tip = document.getElementById("tip");
              if (!tip.hidden) texts.add(tip.textContent);
            }
            return [...texts];
            """
        )
        assert found
        assert all(tip.startswith("Sequence 0, req-1: ") for tip in found)
        browser.get("about:blank")
    assert console_errors(browser) == []


# -------------------------------------------------------------------------------- over HTTP


def read(address: str) -> Iterator[dict[str, Any]]:
    """The frames of one stream, to its end."""
    with (
        httpx.Client(timeout=PATIENCE, trust_env=False) as client,
        client.stream("GET", f"{address}live/events") as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield json.loads(line.removeprefix("data: "))


def test_the_files_name_nothing_from_elsewhere() -> None:
    with served(open_scripted_engine(ScriptedBackend())) as server:
        for path in OPEN_PATHS:
            answer = httpx.get(server.address.rstrip("/") + path, trust_env=False)
            assert answer.status_code == 200
            assert "//" not in answer.text.replace("// ", "").replace("</", "")
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in policy


def test_the_page_works_below_a_path_of_the_apps(browser: Chrome) -> None:
    with served(
        open_scripted_engine(ScriptedBackend()),
        wrap=lambda app: Starlette(routes=[Mount("/llm", app)]),
    ) as server:
        browser.get(f"{server.address}llm/")
        wait(browser, lambda: state(browser) == "serving")
        browser.get("about:blank")
    assert console_errors(browser) == []


def test_a_viewer_that_goes_ends_the_watching() -> None:
    with served(open_scripted_engine(ScriptedBackend())) as server:
        frames = read(server.address)
        assert next(frames)["setup"]
        assert server.engine._watchers
        frames.close()  # type: ignore[attr-defined]
        server.run(until, lambda: not server.engine._watchers)


def test_a_stream_ends_when_the_engine_has_drained() -> None:
    backend = ScriptedBackend(n_ctx=400)
    held = backend.hold_step(2)
    with served(open_scripted_engine(backend)) as server:
        frames = read(server.address)
        next(frames)
        request = server.run(submitted, server.engine)
        server.run(held.reached)
        draining = asyncio.run_coroutine_threadsafe(server.engine.drain(), server.loop)
        assert next(f for f in frames if f["state"] == "draining")["stats"]["running"] == 1
        held.release()
        *_, last = frames
        assert (last["state"], last["stats"]["running"]) == ("draining", 0)
        assert last["stats"]["finished"]["length"] == 1
        server.run(request._result)
        draining.result(PATIENCE)


def test_a_server_can_stop_although_a_page_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_LONGEST_STREAM", 0.5)
    with served(open_scripted_engine(ScriptedBackend())) as server:
        frames = read(server.address)
        next(frames)
        server.stop()
        assert [frame["state"] for frame in frames][-1] == "serving", "to the end"
