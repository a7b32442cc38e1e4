"""What the compiler makes of every Triton kernel, without a GPU: `python -m fastmum.kernels.report`."""
