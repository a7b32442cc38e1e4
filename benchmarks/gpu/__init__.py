"""What to measure in the first hour on a GPU: `python -m benchmarks.gpu`, from a checkout, without a network.

`stages` has the table of stages. Each is a program, such as `benchmarks.gpu.products`, that runs in a separate process
with a time limit and writes what it finds to a file, row by row (`record`). `results` and `page` put the files
together after every stage. With `--small` all of it runs on a CPU.
"""
