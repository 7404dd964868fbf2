"""Without an NVIDIA driver JAX is told to use the CPU, before any test module imports it."""

import os
import shutil

if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
