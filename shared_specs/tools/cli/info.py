"""`psa info`: versions, devices, and which implementation would run."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from typing import Any

# The input whose implementation is asked for: small, and nothing about it is special.
_SHAPE = (1, 2, 256, 64)
_BLOCK_M, _BLOCK_N = 128, 64
_VERSIONS = ("numpy", "torch", "triton", "jax", "jaxlib", "flax")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "info", help="versions, devices, which implementation would run and why others would not"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print everything; a framework that is absent is a line, not a failure."""
    from shared_specs import __version__

    print(f"pyramid-sparse-attention {__version__}, Python {platform.python_version()}")
    for name in _VERSIONS:
        print(f"  {name:<8} {_version(name)}")
    for package, inputs in (("psa_torch", _torch_inputs), ("psa_jax", _jax_inputs)):
        print(f"\n{package}")
        try:
            attention = importlib.import_module(f"{package}.attention")
        except ImportError as error:
            print(f"  not usable: {error}")
            continue
        for device, dtype, qkv in inputs():
            for line in _implementations(attention, device, dtype, qkv):
                print(f"  {line}")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _implementations(attention: Any, device: str, dtype: str, qkv: tuple) -> Iterator[str]:
    chosen = attention.choose(None, *qkv, block_m=_BLOCK_M, block_n=_BLOCK_N)
    yield f"{device}, {dtype}: {chosen} would run"
    for name, implementation in attention.IMPLEMENTATIONS.items():
        if name != chosen:
            reason = implementation.unsupported(*qkv, _BLOCK_M, _BLOCK_N)
            yield f"    {name}: {reason or 'runs when asked for by name'}"


def _torch_inputs() -> Iterator[tuple[str, str, tuple]]:
    import torch

    devices = [("cpu", "cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append((f"cuda:{index} {torch.cuda.get_device_name(index)}", f"cuda:{index}"))
    for label, device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.zeros(_SHAPE, dtype=dtype, device=device)
            yield label, str(dtype).removeprefix("torch."), (q, q, q)


def _jax_inputs() -> Iterator[tuple[str, str, tuple]]:
    import jax
    import jax.numpy as jnp

    for device in [*jax.devices(), *(jax.devices("cpu") if jax.default_backend() != "cpu" else [])]:
        for dtype in (jnp.float32, jnp.bfloat16):
            q = jax.device_put(jnp.zeros(_SHAPE, dtype), device)
            yield f"{device.platform}:{device.id} {device.device_kind}", str(q.dtype), (q, q, q)
