"""`psa parity`: every implementation that can run here, against the oracle and each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    from shared_specs.tools.parity import DTYPES, SIZES

    parser = subparsers.add_parser(
        "parity", help="compare the implementations that run here with the oracle and each other"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["small"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw errors (viz extra)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return 1 when anything is over its limit."""
    from shared_specs.tools import parity
    from shared_specs.tools.cli.progress import track

    adapters, missing = parity.find_adapters(args.device)
    for name, reason in missing.items():
        print(f"not run: {name}: {reason}")
    if not adapters:
        raise ValueError(f"no implementation can run on {args.device}")
    workloads = [workload for size in args.sizes for workload in parity.SIZES[size]]
    results = parity.run_parity(
        adapters, workloads, args.dtype, lambda items: track(items, "parity")
    )
    print(_tables(results, [adapter.name for adapter in adapters], args.dtype))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        from shared_specs.tools.figures import plot_parity

        plot_parity(results).savefig(args.figure, dpi=150, bbox_inches="tight")
    over = parity.failures(results)
    for row in over:
        print("OVER THE LIMIT", json.dumps(row))
    return 1 if over else 0


def _tables(results: dict, names: list[str], dtypes: list[str]) -> str:
    from shared_specs.tools.parity import OUTPUTS

    lines = ["", "relative error against the float64 oracle, worst over the workloads"]
    lines.append("(in brackets: as a multiple of what plain dense attention reaches in the dtype)")
    width = max(map(len, names)) + 2
    for dtype in dtypes:
        lines += ["", f"{dtype:<{width}}" + "".join(f"{name:>18}" for name in OUTPUTS)]
        for who in names:
            cells = [_worst(results["errors"], dtype, who, name) for name in OUTPUTS]
            lines.append(f"{who:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    skipped = {
        (row["implementation"], row["dtype"], row["skipped"])
        for row in results["errors"]
        if "skipped" in row
    }
    lines += [f"skipped: {who} [{dtype}]: {why}" for who, dtype, why in sorted(skipped)]
    if results["pairs"]:
        lines += ["", "relative difference of out between implementations, worst"]
        pairs = dict.fromkeys(row["implementation"] for row in results["pairs"])
        for pair in pairs:
            cells = [_worst(results["pairs"], dtype, pair, "out") for dtype in dtypes]
            text = ", ".join(f"{d} {c.strip()}" for d, c in zip(dtypes, cells, strict=True) if c)
            lines.append(f"  {pair}: {text}")
    lines += ["", "levels end to end (agreement with NumPy), and from equal scores"]
    for who in names:
        rows = [row for row in results["selection"] if row["implementation"] == who]
        least = min(row["agreement"] for row in rows)
        same = all(row["exact_from_equal_scores"] for row in rows)
        lines.append(f"{who:<{width}}  {least:.4%}   {'exact' if same else 'DIFFERENT'}")
    return "\n".join(lines)


def _worst(rows: list[dict], dtype: str, who: str, output: str) -> str:
    found = [
        row
        for row in rows
        if (row["dtype"], row["implementation"], row.get("output")) == (dtype, who, output)
    ]
    if not found:
        return "-"
    worst = max(found, key=lambda row: row["relative"])
    times = f" ({2 * worst['relative'] / worst['limit']:.2f})" if "limit" in worst else ""
    return f"{worst['relative']:.1e}{times}"
