"""Files installed with the package: configurations and launch scripts."""

from __future__ import annotations

import difflib
from pathlib import Path

from fastmum.errors import FastmumError

PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """The folder `configs` or `launch`: inside the installed package, or next to it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def config_names() -> list[str]:
    """Names of the installed configurations, such as "quickstart" and "evidence/mum"."""
    folder = resource_dir("configs")
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def find_config(name_or_path: str | Path) -> Path:
    """An existing file, or the installed configuration of that name.

    Raises:
        FastmumError: neither; lists the installed names and the nearest name or file.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    installed = config_names()
    if path.as_posix() in installed:
        return resource_dir("configs") / f"{path}.yaml"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
    nearest = [str(path.parent / near[0])] if near else difflib.get_close_matches(str(path), installed, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise FastmumError(
        f"configuration file '{path}' does not exist{hint} (installed configurations: {', '.join(installed)})"
    )
