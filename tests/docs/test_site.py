"""The site: it builds strictly, its links lead somewhere, it loads nothing from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import look_at_site
import mtpbatch
import reference_pages
from browsing import open_browser, set_screen
from docs_pages import ROOT
from from_code import errors
from mtpbatch import MtpBatchError, native, testing

BASE = "http://site/"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


class Parsed(HTMLParser):
    """A page's anchors, the links that a reader can follow, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


def pages_of(site: Path) -> Iterator[tuple[str, Parsed]]:
    for path in sorted(site.rglob("*.html")):
        yield urljoin(BASE, path.relative_to(site).as_posix()), Parsed(path)


def test_links_lead_to_a_page_and_a_heading_of_it(site: Path) -> None:
    pages = dict(pages_of(site))
    assert len(pages) > 20
    broken = defaultdict(set)
    for url, page in pages.items():
        for link in page.links + page.loaded:
            target = urlsplit(urljoin(url, link))
            if target.netloc != "site":
                continue
            path = site / unquote(target.path).lstrip("/")
            path = path / "index.html" if path.is_dir() else path
            if not path.exists():
                broken[url].add(link)
            elif target.fragment and path.suffix == ".html":
                found = pages[urljoin(BASE, path.relative_to(site).as_posix())].anchors
                if unquote(target.fragment) not in found:
                    broken[url].add(link)
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for url, page in pages_of(site):
        for source in page.loaded:
            assert urlsplit(urljoin(url, source)).scheme in ("http", "data")
            assert urlsplit(urljoin(url, source)).netloc in ("site", ""), (url, source)
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8")


def test_pages_fit_on_a_phone_and_complain_of_nothing(site: Path) -> None:
    if not (shutil.which("chromium") or shutil.which("apt-get")):
        pytest.skip("NOT TESTED: the site's pages, as there is neither chromium nor apt-get here")
    with look_at_site.served(site) as address, open_browser() as browser:
        set_screen(browser, *look_at_site.SCREENS["phone"])
        for page in look_at_site.pages_of(site):
            if page.startswith("examples/"):
                continue  # code
            assert look_at_site.faults(browser, address, page) == [], page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    anchors = {anchor for _, page in pages_of(site) for anchor in page.anchors}
    names = {f"mtpbatch.{name}" for name in mtpbatch.__all__}
    names |= {f"mtpbatch.testing.{name}" for name in testing.__all__}
    names |= {f"mtpbatch.native.{name}" for name in native.__all__}
    assert names <= anchors


def test_pages_made_from_the_code_are_up_to_date() -> None:
    for path, text in reference_pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, "run python tools/reference_pages.py"


def test_every_error_has_a_cause_a_remedy_and_is_listed() -> None:
    listed = errors.kinds()
    assert {kind.__name__ for kind in listed} == {
        name
        for name, thing in vars(mtpbatch).items()
        if isinstance(thing, type) and issubclass(thing, MtpBatchError)
    }
    for kind in listed[1:]:  # the first is the base of all
        cause, remedy, what = errors.as_text(kind).partition(errors.REMEDY)
        assert cause.strip(), kind
        assert remedy, kind
        assert what.strip().endswith("."), kind
