"""``python -m gptrainer`` is ``gpkernels train``, for ``torchrun -m gptrainer``."""

import sys

from gptrainer.cli import main

sys.exit(main(sys.argv[1:]))
