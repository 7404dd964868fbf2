"""Where the tests of Triton kernels put their tensors: a GPU, or the CPU under the interpreter."""

import os

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def to_device(x: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of `x`, in its own dtype unless another is given."""
    return torch.tensor(x, dtype=dtype, device=DEVICE)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """`x` on the host, 16-bit floats widened to float32."""
    return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).cpu().numpy()
