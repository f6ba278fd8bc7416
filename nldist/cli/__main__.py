"""`python -m nldist.cli`, for torchrun."""

import sys

from nldist.cli import main

if __name__ == "__main__":
    sys.exit(main())
