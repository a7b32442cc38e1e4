"""A process that renders scenes: `python -m fastmum.scenes.worker`, started by `cache`.

One JSON job a line on stdin ({"root", "index", "seed", "views", "size"}); on stdout a line "view" after each view, then
"done", or "error" and a JSON list [exception name, message]. It ends when stdin does. A program of its own, rather than
multiprocessing, so that a caller's script is never imported again.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from fastmum.scenes.files import Settings, write_scene


def main() -> int:
    """Serves jobs until stdin closes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` still clears the temporary folder
    try:
        for line in sys.stdin:
            job = json.loads(line)
            try:
                settings = Settings(job["seed"], job["views"], job["size"])
                write_scene(Path(job["root"]), job["index"], settings, lambda: print("view", flush=True))
                print("done", flush=True)
            except OSError as error:
                print("error", json.dumps([type(error).__name__, str(error)]), flush=True)
    except (KeyboardInterrupt, BrokenPipeError):
        return 130  # the parent has ended or is ending, and says so
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the interpreter's own shutdown may be cut short in silence
    return 0


if __name__ == "__main__":
    sys.exit(main())
