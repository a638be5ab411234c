"""Pictures of load-test reports, for the docs: simulated runs, as Chromium shows their pages.

PYTHONPATH=tests python tools/picture_reports.py
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from PIL import Image  # comes with matplotlib

from loadtest.simulated_runs import simulated_run
from mtpbatch.loadtest.report import html, side_by_side

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 1280
COLOURS = 128
OFFLINE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DARK = "--blink-settings=preferredColorScheme=0"


def picture(page: str, name: str, height: int, *options: str) -> None:
    """Write the upper part of a page as PNG, in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        shown, shot = Path(folder) / "page.html", Path(folder) / "shot.png"
        shown.write_text(page, encoding="utf-8")
        command = [
            *("chromium", *OFFLINE, *options),
            f"--user-data-dir={folder}/profile",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{height}",
            f"--screenshot={shot}",
            shown.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
        image.save(IMAGES / name, optimize=True)
    print(f"{name}: {(IMAGES / name).stat().st_size / 1000:.0f} kB")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    picture(html.report(simulated_run(name="A simulated run")), "load-test-report.png", 1980)
    labels = ["without drafts", "with drafts"]
    runs = [
        simulated_run(name=label, depth=depth, n=1500, rate=7.0)
        for label, depth in zip(labels, (0, 3), strict=True)
    ]
    page = side_by_side.compare(runs, labels).page()
    picture(page, "load-test-comparison.png", 1560, DARK)


if __name__ == "__main__":
    main()
