"""`python -m benchmarks run` times; `python -m benchmarks report` makes tables and a figure."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from benchmarks import report, runner
from benchmarks.workloads import workloads

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# What the repository's own tables are made of, in the order in which they show the machines.
STORED = [ROOT / "benchmarks" / "results" / f"{name}.jsonl" for name in ("cpu", "h100", "h200")]


def main() -> int:
    """Parse the command line and do what it asks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time every provider on every workload of a device")
    run.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    run.add_argument("--workload", default="", help="only workloads whose name contains this")
    run.add_argument("--provider", default="", help="only providers whose name contains this")
    run.add_argument("--framework", choices=runner.FRAMEWORKS, help="only this one")
    run.add_argument("--repeats", type=int, default=10, help="timed runs per row (default 10)")
    run.add_argument("--output", type=Path, help="default: outputs/bench/DEVICE-TIME.jsonl")
    made = commands.add_parser("report", help="tables and figure from stored rows")
    made.add_argument(
        "rows", nargs="*", type=Path, metavar="ROWS.jsonl", help="default: the stored rows"
    )
    made.add_argument(
        "--page", type=Path, help="put tables and figure into this page too (docs/benchmarks.md)"
    )
    made.add_argument(
        "--summary", type=Path, help="put a row a machine and framework into this (README.md)"
    )
    made.add_argument(
        "--demo", type=Path, metavar="DIR", help="put what `psa demo` wrote to DIR into README.md"
    )
    args = parser.parse_args()
    if args.command == "report":
        rows = args.rows or STORED
        if args.summary is not None:
            report.summarise(rows, args.summary)
        if args.page is not None or (args.summary is None and args.demo is None):
            report.write(rows, args.page)
        if args.demo is not None:
            report.insert_demo(args.demo, README)
        return 0
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    chosen = [work for work in workloads(args.device) if args.workload in work.name]
    if not chosen:
        names = ", ".join(work.name for work in workloads(args.device))
        parser.error(f"no workload contains {args.workload!r}; there are: {names}")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    rows = runner.run(
        chosen,
        args.output or Path("outputs", "bench", f"{args.device}-{now}.jsonl"),
        provider=args.provider,
        repeats=args.repeats,
        frameworks=(args.framework,) if args.framework else runner.FRAMEWORKS,
    )
    return int(any(row["status"] in (runner.WRONG, runner.FAILED) for row in rows))


sys.exit(main())
