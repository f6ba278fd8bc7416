"""`nldist submit` under the name that users know."""

import sys

from nldist.cli.submit import main

if __name__ == "__main__":
    sys.exit(main())
