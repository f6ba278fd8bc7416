"""`nldist verify` under the name that users know."""

import sys

from nldist.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
