"""``python -m gpkernels`` is ``gpkernels``."""

import sys

from gpkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
