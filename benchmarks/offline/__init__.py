"""The cost of a training step on a GPU, predicted on a machine without one: `python -m benchmarks.offline`.

The step is traced with fake tensors, lowered for the GPU by Inductor if the side compiles, and every kernel that would
be launched is recorded with its operations and bytes. See `steps` for the steps, `operators` for the formulas,
`efficiency` for the shares that kernels reach, `pricing` for the times.
"""
