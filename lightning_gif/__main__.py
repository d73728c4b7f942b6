"""``python -m lightning_gif``: see :mod:`lightning_gif.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
