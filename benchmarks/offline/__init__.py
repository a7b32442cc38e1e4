"""What a training step costs on a GPU, predicted on a machine without one: `python -m benchmarks.offline`.

The step is traced with tensors that have no memory, lowered for the GPU by Inductor where a side compiles, and every
kernel that would be launched is written down with its operations and bytes. See `steps` for what is lowered, `kernel`
for the roofline, `operators` for the formulas.
"""
