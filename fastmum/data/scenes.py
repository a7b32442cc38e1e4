"""`python -m fastmum.data.scenes`: the same command as `python -m fastmum.scenes`."""

import sys

from fastmum.scenes.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
