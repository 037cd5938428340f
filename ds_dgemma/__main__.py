"""`python -m ds_dgemma`: the same as `ds-dgemma`."""

import sys

from ds_dgemma.cli import main

if __name__ == "__main__":
    sys.exit(main())
