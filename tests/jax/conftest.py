"""Without an NVIDIA driver JAX is told to use the CPU, before any test module imports it."""

import os
import shutil

if not (os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A kernel's threads that wait for a barrier in Mosaic's interpreter occupy threads of XLA. As many
# of those as a small machine has cores are too few: the thread they wait for would get none.
os.environ.setdefault("NPROC", "8")
