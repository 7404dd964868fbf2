"""`psa apply --list`: the models of other libraries that PSA goes into."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("apply", help="list the models of other libraries PSA goes into")
    parser.add_argument(
        "--list",
        action="store_true",
        required=True,
        help="families of diffusers' transformers (applying itself is a call in Python)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List."""
    from importlib.metadata import PackageNotFoundError, version

    from psa_torch.integrations.families import FAMILIES

    for name, family in FAMILIES.items():
        print(name)
        print(f"  classes  {', '.join(family.classes)}")
        print(f"  dense    {family.dense}")
        print(f"  presets  {', '.join(family.presets) or 'none published: give config='}")
    print("\nfrom psa_torch.integrations.diffusers import apply; apply(pipe, preset)")
    print("Causal decoders of transformers: psa_torch.integrations.transformers.register(name)")
    for library in ("diffusers", "transformers"):
        try:
            print(f"{library} {version(library)} is installed here.")
        except PackageNotFoundError:
            extra = "pyramid-sparse-attention[integrations]"
            print(f"{library} is not installed: pip install '{extra}'")
    return 0
