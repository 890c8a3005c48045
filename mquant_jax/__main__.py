"""``python -m mquant_jax``."""

import sys

from mquant_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
