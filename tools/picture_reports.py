"""Pictures of load-test reports, for the docs: a page as Chromium shows it, in few colours.

python tools/picture_reports.py report.html docs/images/load-test-report.png --height 1500
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image  # comes with matplotlib

COLOURS = 64
OFFLINE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def picture(page: Path, image: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Write the upper part of a page as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [
            "chromium",
            *OFFLINE,
            f"--user-data-dir={folder}/profile",
            "--hide-scrollbars",
            f"--window-size={width},{height}",
            f"--screenshot={shot}",
            page.resolve().as_uri(),
        ]
        if dark:
            command.insert(1, "--blink-settings=preferredColorScheme=0")
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").quantize(COLOURS).save(image, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    picture(options.page, options.image, options.width, options.height, dark=options.dark)
    print(f"{options.image}: {options.image.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
