"""`psa mask`: draw the level mask of saved queries and keys."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "mask",
        help="draw the level mask of saved q and k",
        description="The .npz file holds q [B, H, Lq, D] and k [B, Hk, Lk, D]. Scores and levels "
        "come from the NumPy reference, so no framework is needed.",
    )
    parser.add_argument("file", metavar="QK.npz", help="NumPy archive with arrays 'q' and 'k'")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--config", metavar="FILE", help="configuration, .json or .toml")
    choice.add_argument("--preset", metavar="NAME", help="one of `psa presets`")
    parser.add_argument("--batch", type=int, default=0, help="which batch entry (default 0)")
    parser.add_argument(
        "--heads", type=int, nargs="+", metavar="H", help="which heads (default: the first 8)"
    )
    parser.add_argument(
        "--output", metavar="IMAGE", default="mask.png", help="default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw the mask and print each head's density."""
    from shared_specs.importance import block_scores
    from shared_specs.masks import density
    from shared_specs.selection import candidate_blocks, select_levels
    from shared_specs.similarity import similarity_cap
    from shared_specs.tools.figures import plot_levels, require_pyplot, save_figure

    require_pyplot()
    config = _config(args)
    q, k = _load(args.file)
    heads = _pick("heads", args.heads or range(min(8, q.shape[1])), q.shape[1])
    batch = _pick("batch", [args.batch], q.shape[0])
    group = q.shape[1] // k.shape[1]
    q, k = q[batch][:, heads], k[batch][:, [head // group for head in heads]]
    lengths = {"q_len": q.shape[2], "kv_len": k.shape[2]}
    cap = similarity_cap(k, config) if config.use_sim_mask else None
    levels = select_levels(block_scores(q, k, config), config, **lengths, cap=cap)
    candidates = candidate_blocks(lengths["q_len"], lengths["kv_len"], config)
    titles = []
    for head, mask in zip(heads, levels[0], strict=True):
        share = density(mask[None, None], candidates=candidates, rest_share=config.rest_share)
        titles.append(f"head {head}, density {share:.1%}")
        print(titles[-1])
    axes = plot_levels(levels[0], titles=titles)
    save_figure(axes[0].figure, args.output)
    print(f"wrote {args.output}")
    return 0


def _config(args: argparse.Namespace):
    from shared_specs.config import PSAConfig

    if args.config is not None:
        return PSAConfig.load(args.config)
    if args.preset is not None:
        return PSAConfig.preset(args.preset)
    return PSAConfig()


def _load(path: str) -> tuple[np.ndarray, np.ndarray]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it holds one array")
        with archive:
            q, k = archive["q"], archive["k"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz archive with arrays 'q' and 'k'") from error
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating) or x.size == 0:
            raise ValueError(
                f"{name} in {path} must be floating point [B, H, L, D] and not empty, "
                f"got {x.dtype} {x.shape}"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{name} in {path} must be finite")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} in {path} must have equal B and D, and H a multiple of Hk"
        )
    return q, k


def _pick(name: str, wanted, count: int) -> list[int]:
    wanted = list(wanted)
    for index in wanted:
        if not 0 <= index < count:
            raise ValueError(f"--{name} must be in 0..{count - 1}, got {index}")
    return wanted
