"""What a user can fix ends a recipe with one line in place of a traceback."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL.Image import DecompressionBombError
from safetensors import SafetensorError

# Everything else is a bug, and shows its traceback.
EXPECTED = (
    ValueError, OSError, SafetensorError, DecompressionBombError, FloatingPointError, subprocess.CalledProcessError
)  # fmt: skip


def explain_errors(main: Callable[[], object]) -> None:
    """Run a script's ``main``; an expected error is one line on stderr and exit code 2, Ctrl-C exit code 130.

    ``accelerate launch`` adds a traceback of its own and ends with 1; ``accelerate launch --quiet`` does not add it.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
    except EXPECTED as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted.", file=sys.stderr)
        sys.exit(130)
