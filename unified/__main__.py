"""``python -m unified`` is ``unified``."""

import sys

from unified.cli import main

sys.exit(main())
