"""`python -m fastmum.kernels.report`: the kernels' report of a checkout, see `benchmarks.kernel_report`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks/kernel_report").is_dir():
        print("error: the kernels' report needs a checkout of fastmum: run it in one", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(root))
    from benchmarks.kernel_report.__main__ import main

    main()
