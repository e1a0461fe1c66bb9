"""``python -m titanlm`` is the command ``titanlm``."""

import sys

from titanlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
