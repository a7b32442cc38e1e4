"""`python -m fastmum.export`."""

import sys

from fastmum.export.command import main

sys.exit(main())
