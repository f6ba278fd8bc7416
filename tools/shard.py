"""`nldist shard` under the name that users know."""

import sys

from nldist.cli.shard import main

if __name__ == "__main__":
    sys.exit(main())
