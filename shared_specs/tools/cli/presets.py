"""`psa presets`: configurations by name, the published ones and our own."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("presets", help="list the presets, or print one as TOML")
    parser.add_argument("name", nargs="?", help="print this preset in full")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List, or print one."""
    from shared_specs.config import PSAConfig
    from shared_specs.presets import names

    if args.name is not None:
        print(PSAConfig.preset(args.name).to_toml(), end="")
        return 0
    head = ("preset", "mode", "form", "m x n", "ends of levels 1/2/4/8", "order")
    rows = [head] + [_row(name, PSAConfig.preset(name)) for name in names()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def _row(name, config) -> tuple[str, ...]:
    if config.mask_mode == "budget":
        ends = f"budget {config.budget:g}"
    else:
        ends = "/".join(
            f"{config.mask_ratios[level][1]:g}" if level in config.mask_ratios else "-"
            for level in (1, 2, 4, 8)
        )
    form = config.attn_impl.removesuffix("_mask_type")
    blocks = f"{config.block_m}x{config.block_n}"
    return name, config.mask_mode, form, blocks, ends, config.rearrange_method or "-"
