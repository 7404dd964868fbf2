"""What is timed: the shapes and configurations of each workload."""

from __future__ import annotations

import dataclasses
import math

from shared_specs.config import PSAConfig

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)

VIDEO_SIZE = (1280, 768, 69)
"""Width, height and frames of the full-size presets: 80 x 48 x 18 tokens for Wan 2.1."""

FULL_SIZE_PRESETS = (
    "wan2.1-14b",
    "wan2.1-1.3b-topk",
    "wan2.2-a14b",
    "wan2.2-5b",
    "cogvideox1.5-5b",
    "cogvideox-5b",
    "cogvideox-5b-4step",
)
"""Those without a similarity cap, which levels given to a kernel do not have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One shape with one configuration.

    Attributes:
        name: unique; names device, shape and configuration.
        device: 'cpu' or 'gpu'.
        heads, kv_heads: query heads and key/value heads.
        length: tokens, of queries and keys alike.
        head_dim: channels per head.
        dtype: 'float32' or 'bfloat16'.
        config: how levels are chosen and which block sizes attention has.
        passes: what is timed.
    """

    name: str
    device: str
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str
    config: PSAConfig
    passes: tuple[str, ...] = PASSES

    def dense_flops(self) -> int:
        """Of the two products of a dense forward pass; under a causal mask the visible half."""
        pairs = self.length**2
        if self.config.causal:
            pairs = self.length * (self.length + 1) // 2
        return 4 * self.heads * self.head_dim * pairs


def _gpu(name: str, heads: int, length: int, head_dim: int, config: PSAConfig, **more) -> Workload:
    return Workload(
        name=name,
        device="gpu",
        heads=heads,
        kv_heads=more.pop("kv_heads", heads),
        length=length,
        head_dim=head_dim,
        dtype="bfloat16",
        config=config,
    )


def _preset(name: str) -> Workload:
    config = dataclasses.replace(PSAConfig.preset(name, VIDEO_SIZE), rearrange_method=None)
    length = math.prod(config.grid) + config.text_length
    return _gpu(f"gpu-preset-{name}", 24, length, 128, config)


def workloads(device: str) -> list[Workload]:
    """The workloads of a device, 'cpu' or 'gpu'."""
    default = PSAConfig()
    if device == "cpu":
        return [
            Workload(
                name="cpu-8k-h8-d64-default",
                device="cpu",
                heads=8,
                kv_heads=8,
                length=8192,
                head_dim=64,
                dtype="float32",
                config=default,
                passes=(FORWARD, BOTH),
            )
        ]
    # No token order here and below: what is timed is the mask, and the order is a gather.
    wan = dataclasses.replace(PSAConfig.preset("wan2.1-14b"), rearrange_method=None)
    return [
        # Short ones, where the host's time decides whether a call pays.
        _gpu("gpu-4k-h24-d128-default", 24, 4096, 128, default),
        _gpu("gpu-8k-h24-d128-default", 24, 8192, 128, default),
        _gpu("gpu-17k-h24-d128-default", 24, 17_776, 128, default),
        _gpu("gpu-32k-h24-d128-default", 24, 32_768, 128, default),
        _gpu("gpu-69k-h24-d128-default", 24, 69_120, 128, default),
        _gpu("gpu-32k-h12-d128-default", 12, 32_768, 128, default),
        _gpu("gpu-32k-h16-d64-default", 16, 32_768, 64, default),
        _gpu("gpu-32k-h24-d128-wan2.1-14b", 24, 32_768, 128, wan),
        # A quarter of the multiplications that scores take at the default of 4.
        _gpu(
            "gpu-32k-h24-d128-pool8",
            24,
            32_768,
            128,
            dataclasses.replace(default, importance_pool=8),
        ),
        _gpu(
            "gpu-32k-h28kv4-d128-causal",
            28,
            32_768,
            128,
            dataclasses.replace(default, causal=True),
            kv_heads=4,
        ),
        *(_preset(name) for name in FULL_SIZE_PRESETS),
    ]
