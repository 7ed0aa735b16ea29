"""Runs a command that says too much, and shows how its compilation goes.

    python tools/progress.py build/package.log pip install -v .

All output goes into the log. Of it, ninja's lines ("[3/14] Building ...") are shown as they come,
and the whole log if the command fails.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

STEP = re.compile(r"\s*(\[\d+/\d+\]) (.*)")
OBJECT = re.compile(r"Building CXX object \S*?CMakeFiles/(\S+?)\.dir/\S*?([^/\s]+)\.o\b")


def shown(line: str) -> str | None:
    """Shortens a line of ninja's; None for any other."""
    if not (step := STEP.match(line)):
        return None
    if built := OBJECT.search(step[2]):
        return f"{step[1]} {built[2]} ({built[1]})"
    return f"{step[1]} {step[2].strip()}"


def run(log: Path, command: list[str]) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            if short := shown(line):
                print(f"{time.monotonic() - start:5.0f} s {short}", flush=True)
    if process.returncode:
        print(log.read_text(encoding="utf-8"), file=sys.stderr)
        print(f"failed: {' '.join(command)}", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
