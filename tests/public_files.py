"""Files with outputs of public code, from FASTMUM_FIXTURES, else ../shared/downstream/fixtures next to the checkout.

Every file of a layout is run, whatever its prefix.
"""

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1].parent / "shared/downstream/fixtures"
FIXTURES = Path(os.environ.get("FASTMUM_FIXTURES") or ROOT)


def files(folder: str, ending: str) -> list[Any]:
    """The files `*_ending` of a folder as parameters; one skipped parameter where there are none."""
    found = sorted((FIXTURES / folder).glob(f"*_{ending}"))
    absent = pytest.mark.skip(reason=f"no {folder}/*_{ending} in {FIXTURES}: set FASTMUM_FIXTURES")
    return [pytest.param(file, id=file.stem) for file in found] or [pytest.param(Path(), marks=absent, id="absent")]
