"""Hand hostile and odd inputs to every entry point and count what becomes of them.

    python tests/fuzz.py [WORDS ...] [--json FILE]

WORDS choose the entry points whose names hold one of them. Needed
are: one clear line for every input that is wrong, and nothing else. The exit code is 1 if something else happens.
"""

import argparse
import contextlib
import io
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

import datasets
import transformers
from hostile import data, folders, functions, pipeline, programs, remote, settings
from hostile.case import VALID, Case, Silent
from hostile.world import World

from unified.errors import EXPECTED

CASES: list[Case] = [
    case for part in (settings, functions, pipeline, data, folders, programs, remote) for case in part.CASES
]
CLEAR, ACCEPTED = "clear error", "valid, accepted"
REFUSED, VAGUE, SILENT = "valid, refused", "error without the field", "silent acceptance"
HANG, CRASH, EXECUTED = "hang", "crash", "code executed"
OUTCOMES = (CLEAR, ACCEPTED, REFUSED, VAGUE, SILENT, HANG, CRASH, EXECUTED)
MOST_MEMORY = 6 * 2**30  # bytes of this process
# A name that is no path is not looked up.
OFFLINE = [patch("huggingface_hub.constants.HF_HUB_OFFLINE", True), patch("datasets.config.HF_HUB_OFFLINE", True)]
LONGEST = 1500  # characters of an error that can still be read


class Outcome(NamedTuple):
    """What became of a case, and the error or a note."""

    kind: str
    detail: str

    @property
    def good(self) -> bool:
        return self.kind in (CLEAR, ACCEPTED)


class TimedOut(BaseException):
    """The alarm of a case; no handler of exceptions catches it."""


def run(case: Case, world: World, seconds: int = 60) -> Outcome:
    """Run a case and judge its end."""
    errors = io.StringIO()
    try:
        with warnings.catch_warnings(), alarm(seconds), memory(MOST_MEMORY), contextlib.redirect_stderr(errors):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()), OFFLINE[0], OFFLINE[1]:
                case.call(world)
        outcome = Outcome(ACCEPTED if case.words == VALID else SILENT, "accepted")
    except TimedOut:
        outcome = Outcome(HANG, f"not back after {seconds} s")
    except Silent as error:
        outcome = Outcome(SILENT, str(error))
    except EXPECTED as error:
        outcome = judge(case, str(error))
    except SystemExit as error:
        lines = errors.getvalue().strip().splitlines()
        refused = error.code == 2 and lines
        outcome = judge(case, lines[-1]) if refused else Outcome(CRASH, f"exit code {error.code}: {lines[-1:]}")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = Outcome(CRASH, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    if world.marker.exists():
        world.marker.rmdir()
        return Outcome(EXECUTED, outcome.detail)
    return outcome


def judge(case: Case, message: str) -> Outcome:
    """Whether an error says what it has to, in a line that can be read."""
    line = " ".join(message.split())
    if case.words == VALID:
        return Outcome(REFUSED, line)
    missing = [word for word in case.words.split() if word not in line]
    if missing or len(line) > LONGEST:
        return Outcome(VAGUE, f"{line[:400]} [lacks {missing}, {len(line)} characters]")
    return Outcome(CLEAR, line)


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TimedOut after so many seconds."""

    def ring(*_: Any) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory(most: int) -> Iterator[None]:
    """Let an allocation beyond so many bytes in all fail, in place of filling the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def table(found: Sequence[tuple[Case, Outcome]]) -> str:
    """Counts of the outcomes by entry point."""
    kinds = [kind for kind in OUTCOMES if any(outcome.kind == kind for _, outcome in found)]
    counts: dict[str, Counter[str]] = {}
    for case, outcome in found:
        counts.setdefault(case.entry, Counter())[outcome.kind] += 1
    total = Counter(outcome.kind for _, outcome in found)
    width = max(map(len, counts))
    lines = [f"{'entry point':<{width}} {'cases':>6}" + "".join(f"  {kind}" for kind in kinds)]
    for entry, row in [*counts.items(), ("all", total)]:
        lines.append(
            f"{entry:<{width}} {row.total():>6}" + "".join(f"  {row[kind] or '':>{len(kind)}}" for kind in kinds)
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the entry points whose names hold one of these")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    chosen = [case for case in CASES if not args.words or any(word in case.entry for word in args.words)]
    found, records = [], []
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        for case in chosen:
            start = time.monotonic()
            outcome = run(case, world)
            seconds = time.monotonic() - start
            found.append((case, outcome))
            records.append({"entry": case.entry, "input": case.name, "outcome": outcome.kind, "detail": outcome.detail,
                            "seconds": round(seconds, 3)})  # fmt: skip
            if args.verbose or not outcome.good:
                print(f"{outcome.kind}: {case.entry}: {case.name}: {outcome.detail} ({seconds:.1f} s)", flush=True)
    print(table(found))
    invalid = [outcome for case, outcome in found if case.words != VALID]
    clear = sum(outcome.kind == CLEAR for outcome in invalid)
    print(f"{clear} of {len(invalid)} wrong inputs end with a clear error ({clear / max(len(invalid), 1):.1%})")
    if args.json:
        counts = dict(Counter(outcome.kind for _, outcome in found))
        args.json.write_text(json.dumps({"counts": counts, "cases": records}, indent=2))
    return int(not all(outcome.good for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
