"""An error that a user can fix ends a recipe with one line in place of a traceback."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL.Image import DecompressionBombError
from safetensors import SafetensorError

# Errors of a user's input; and, in a recipe, of a run that diverged or a program that it started.
MENDABLE = (ValueError, OSError, SafetensorError, DecompressionBombError)
# Everything else is a bug, and shows its traceback.
EXPECTED = (*MENDABLE, FloatingPointError, subprocess.CalledProcessError)


def explain_errors(main: Callable[[], object]) -> None:
    """Run a script's ``main``; an expected error is one line on stderr and exit code 2, Ctrl-C exit code 130.

    ``accelerate launch`` adds its own traceback and ends with 1; ``accelerate launch --quiet`` does not add it.
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
