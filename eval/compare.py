"""Compare two evaluations of the same captions and seeds in pairs of images.

    python eval/compare.py runs/a/evaluation runs/b/evaluation [--out runs/comparison]

Each folder is one that `evaluate.py` wrote. Prompts are resampled alike for both, so that hard and easy ones cancel. To
generate and compare two pipelines at once, with images side by side, use `evaluate.py --compare`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from unified.errors import explain_errors
from unified.files import write_json
from unified_eval.command_line import check_folder
from unified_eval.evaluation_report import print_differences, write_comparison_report
from unified_eval.results import VALUES, Results, compare_results


def main(argv: Sequence[str] | None = None) -> None:
    """Read two evaluations, print their differences and, with ``--out``, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, metavar="A", help="folder of an evaluation")
    parser.add_argument("second", type=Path, metavar="B", help="folder of another one")
    parser.add_argument("--out", type=Path, help="folder for metrics.json and report.html (default: print alone)")
    args = parser.parse_args(argv)
    check_folder("out", args.out)
    differences = compare_results(Results.load(args.first / VALUES), Results.load(args.second / VALUES))
    print_differences(differences)
    if args.out is not None:
        run = {"a": str(args.first), "b": str(args.second)}
        write_json(args.out / "metrics.json", {"differences": differences, "run": run, "notes": []})
        notes = [f"A: {args.first}. B: {args.second}."]
        command = shlex.join(["python", *sys.argv])
        print(f"\n{write_comparison_report(args.out / 'report.html', ['A', 'B'], differences, [], notes, command)}")


if __name__ == "__main__":
    explain_errors(main)
