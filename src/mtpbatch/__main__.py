"""``python -m mtpbatch``."""

import sys

from mtpbatch.cli import main

sys.exit(main())
