"""`psa conformance run`: an implementation against the committed cases."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from pathlib import Path

from shared_specs.constants import MATMUL_DTYPES


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from shared_specs.conformance.adapter import TIERS

    parser = subparsers.add_parser(
        "conformance", help="check an implementation against the specification's cases"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("run", help="run an adapter and report; exit status 1 on a failure")
    check.add_argument(
        "adapter",
        metavar="MODULE[:OBJECT]",
        help="or FILE.py[:OBJECT]; OBJECT is `adapter` when left out",
    )
    check.add_argument("--tier", action="append", choices=TIERS, help="only these; repeatable")
    check.add_argument(
        "--dtype", action="append", choices=MATMUL_DTYPES, help="only these; repeatable"
    )
    check.add_argument("--filter", metavar="GLOB", help="only cases whose id matches")
    check.add_argument("--report", metavar="FILE", type=Path, help="write results as JSON")
    check.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained page")
    check.set_defaults(run=run)
    show = actions.add_parser("list", help="the cases: id, section and the mistakes each catches")
    show.set_defaults(run=show_cases)


def run(args: argparse.Namespace) -> int:
    """Run the suite; 0 when nothing failed."""
    from shared_specs.conformance import load_adapter, load_suite, report, run_suite
    from shared_specs.conformance.runner import FAILED, PASSED
    from shared_specs.tools.cli.progress import track

    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a local module can be named
    adapter = load_adapter(args.adapter)
    cases = [
        case
        for case in load_suite()
        if (not args.tier or case.tier in args.tier)
        and (not args.filter or fnmatch.fnmatch(case.id, args.filter))
    ]
    if not cases:
        raise ValueError(f"no case matches --tier {args.tier} --filter {args.filter!r}")
    results = run_suite(adapter, cases, args.dtype, lambda pairs: track(list(pairs), "conformance"))
    name = getattr(adapter, "name", args.adapter)
    print(report.as_text(name, cases, results))
    if args.report:
        args.report.write_text(report.as_json(name, cases, results), encoding="utf-8")
    if args.html:
        args.html.write_text(report.as_html(name, cases, results), encoding="utf-8")
    statuses = [result.status for result in results]
    if FAILED in statuses:
        return 1
    if PASSED not in statuses:
        print("psa conformance: every case was skipped, so nothing is shown", file=sys.stderr)
        return 1
    return 0


def show_cases(args: argparse.Namespace) -> int:
    """Print the suite."""
    from shared_specs.conformance import load_suite

    for case in load_suite():
        print(f"{case.id:<36} section {case.rule:<4} {', '.join(case.flags)}")
    return 0
