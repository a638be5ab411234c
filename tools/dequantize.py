"""Copy a GGUF with every tensor as float32.

    python tools/dequantize.py MODEL.gguf COPY.gguf

Tests that assert equal text use such copies (see :func:`tinymtp.gguf_file.to_f32`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinymtp.gguf_file import to_f32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    asked = parser.parse_args()
    to_f32(asked.source, asked.destination)


if __name__ == "__main__":
    main()
