"""Registers, spills, accesses and bytes of every Triton kernel, without a GPU: `python -m fastmum.kernels.report`."""
