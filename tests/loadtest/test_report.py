"""Reports as pages: whole in themselves, and true of odd runs as well."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import msgspec
import pytest

from loadtest.simulated_runs import simulated_run, simulated_sweep
from mtpbatch.loadtest.records import Record, RunRecord, SweepRecord
from mtpbatch.loadtest.report import side_by_side
from mtpbatch.loadtest.report.charts import MOST_BARS
from mtpbatch.loadtest.report.html import report

VOID = {"meta", "path"}


class Page(HTMLParser):
    """What a page holds; elements that are not closed, or closed wrongly, are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def cut(run: RunRecord, n: int) -> RunRecord:
    return msgspec.structs.replace(run, requests=run.requests[:n])


RUN = simulated_run()
ODD: dict[str, Record] = {
    "no request": cut(RUN, 0),
    "one request": cut(RUN, 1),
    "no window": msgspec.structs.replace(RUN, window=(3.0, 3.0)),
    "errors only": msgspec.structs.replace(
        RUN, requests=tuple(r for r in RUN.requests if r.outcome == "error")
    ),
    "no acceptance": msgspec.structs.replace(
        RUN,
        requests=tuple(
            msgspec.structs.replace(r, drafted=None, accepted=None, steps=None)
            for r in RUN.requests
        ),
        overhead=None,
    ),
    "no SLO": msgspec.structs.replace(RUN, slo={}),
    "no sweep": SweepRecord(name="a", parameter="rate", runs=(), slo={}, capacity=None),
    "capacity nowhere": msgspec.structs.replace(
        simulated_sweep(), capacity=None, parameter="concurrency"
    ),
}


@pytest.mark.parametrize("record", [RUN, simulated_sweep(), *ODD.values()], ids=lambda _: "")
def test_a_page_needs_nothing_from_outside(record: Record) -> None:
    page = Page(report(record))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "a"}
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "xlink:href", "onload", "onclick"}
    text = report(record)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (a for a in page.all("meta") if a.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("record", [RUN, simulated_sweep(), *ODD.values()], ids=lambda _: "")
def test_a_page_can_be_read_without_seeing_it(record: Record) -> None:
    page = Page(report(record))
    assert page.all("html")[0]["lang"] == "en"
    for plot in page.all("svg"):
        assert plot.get("aria-label") or plot.get("aria-hidden") == "true"
    for region in page.all("div"):
        assert ("role" in region) == ("tabindex" in region) == ("aria-label" in region)
    text = " ".join(page.words)
    assert "None" not in text
    assert "nan" not in text


def test_a_report_shows_each_figure_of_the_run_as_plot_and_table() -> None:
    text = report(RUN)
    titles = re.findall(r"<h3>(.+?)</h3>", text)
    assert titles == [
        *("TTFT", "TPOT", "ITL", "ICL", "End to end"),
        *("Output tokens per second", "Requests under way", "TPOT by tokens per step", "Timeline"),
    ]
    assert text.count("<summary>As a table</summary>") == 7
    page = Page(text)
    shown = [plot for plot in page.all("svg") if plot.get("role") == "img"]
    assert len(shown) == len(titles)


def test_each_request_of_a_short_run_has_a_bar_that_tells_of_it() -> None:
    text = report(RUN)
    bars = re.findall(r"<title>request (\d+), sent at ([\d.]+) s: ([^<]+)</title>", text)
    assert sorted(int(index) for index, *_ in bars) == [r.index for r in RUN.requests]
    assert f"All {len(RUN.requests)} requests." in text
    classes = " ".join(re.findall(r'class="bar (\w+)"', text))
    for name in ("queued", "prefill", "decode", "cancelled", "error"):
        assert name in classes


def test_a_report_of_many_requests_stays_small_and_says_what_it_leaves_out() -> None:
    text = report(simulated_run(n=10_000))
    assert len(text.encode()) < 1_000_000
    assert text.count("<title>request ") == MOST_BARS
    assert f"{MOST_BARS} of 10000 requests, sent from second" in text
    assert re.search(r"Each point is a request; \d+ of \d+ are shown", text)


def test_bars_in_a_row_do_not_overlap() -> None:
    text = report(RUN)
    rows: dict[str, list[tuple[float, float]]] = {}
    for left, top, wide in re.findall(r'd="M([\d.]+) ([\d.]+)h([\d.]+)v[^"]+" class="bar', text):
        rows.setdefault(top, []).append((float(left), float(left) + float(wide)))
    assert 10 < len(rows) < 40
    for spans in rows.values():
        spans.sort()
        for before, after in itertools.pairwise(spans):
            assert after[0] >= before[1] - 0.7  # rounded, and what is too short to see is widened


def test_names_and_settings_are_text() -> None:
    evil = "<script>alert(1)</script>"
    run = msgspec.structs.replace(
        cut(RUN, 40), name=evil, target={evil: evil}, environment={evil: 1}
    )
    for text in (
        report(run),
        side_by_side.compare([run, RUN], [evil, "other"]).page(),
    ):
        assert "<script" not in text
        assert evil in " ".join(Page(text).words)


def test_what_a_reader_should_know_first_stands_on_the_page() -> None:
    assert "requests failed: http 429" in report(RUN)
    assert re.search(r"Only [1-9]\d requests count", report(cut(RUN, 100)))
    assert "measure for longer" in report(ODD["errors only"])
    interrupted = msgspec.structs.replace(RUN, load={"interrupted": True})
    assert "was interrupted" in report(interrupted)
    assert "Requests failed: 2 at 4" in report(simulated_sweep())


def test_a_client_that_was_late_is_told_of() -> None:
    assert "bottleneck" not in report(RUN)
    assert "bottleneck" not in report(simulated_sweep())
    assert RUN.overhead is not None
    late = msgspec.structs.replace(RUN.overhead, loop_lag_p99=0.05)
    run = msgspec.structs.replace(RUN, overhead=late)
    assert "The client may be the bottleneck: its event loop was 50 ms late" in report(run)
    sweep = SweepRecord(name="a", parameter="rate", runs=((2.0, run),), slo={}, capacity=None)
    assert "The client may be the bottleneck at 2" in report(sweep)


def test_a_sweep_shows_its_capacity_and_each_run() -> None:
    sweep = simulated_sweep()
    text = report(sweep)
    assert re.search(r"Capacity, requests/s</dt><dd>12<", text)
    for value, _ in sweep.runs:
        assert f"<h2>At {value:g}</h2>" in text
    assert text.count("</svg>capacity 12</li>") == len(re.findall("<h3>", text))
