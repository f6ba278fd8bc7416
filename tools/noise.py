"""`nldist noise` under the name that users know."""

import sys

from nldist.cli.noise import main

if __name__ == "__main__":
    sys.exit(main())
