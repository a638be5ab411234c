"""Every page of the site in Chromium, on a phone and on a desktop, light and dark.

    mkdocs build && python tools/look_at_site.py site pictures

Says which pages scroll sideways, complain on the console or load from elsewhere, and writes a
picture of each. Needs the extra ``browser``, and Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from selenium.webdriver import Chrome

from browsing import console_errors, open_browser, picture, requested, set_screen

SCREENS = {"phone": (390, 844), "desktop": (1280, 800)}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """A folder over HTTP, on a free port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def pages_of(site: Path) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("index.html"))


def faults(browser: Chrome, address: str, page: str) -> list[str]:
    """What is wrong with a page on the screen that is set."""
    browser.get(f"{address}/{page}")
    found = [f"the console says {message}" for message in console_errors(browser)]
    found += [
        f"loads {url}"
        for url in requested(browser)
        if not url.startswith((address, "data:", "blob:"))
    ]
    wide = browser.execute_script(
        "return [document.scrollingElement.scrollWidth, document.documentElement.clientWidth]"
    )
    if wide[0] > wide[1]:
        found.append(f"is {wide[0]} pixels wide on a screen of {wide[1]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--pages", default="", help="only those whose path holds this")
    options = parser.parse_args()
    options.pictures.mkdir(exist_ok=True)
    n_faults = 0
    with served(options.site) as address, open_browser() as browser:
        for page in [page for page in pages_of(options.site) if options.pages in page]:
            for screen, (width, height) in SCREENS.items():
                for scheme in SCHEMES:
                    set_screen(browser, width, height, scheme=scheme)
                    for fault in faults(browser, address, page):
                        print(f"{page} ({screen}, {scheme}) {fault}")
                        n_faults += 1
                    name = page.removesuffix("/index.html").replace("/", "-")
                    path = options.pictures / f"{name}-{screen}-{scheme}.png"
                    path.write_bytes(picture(browser))
    return int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
