"""What the Triton and Gluon kernels of this package share and that means nothing by itself."""
