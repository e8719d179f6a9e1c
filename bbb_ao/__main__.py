"""`python -m bbb_ao`: the same as `bbb-ao`."""

import sys

from bbb_ao.cli import main

if __name__ == "__main__":
    sys.exit(main())
