"""`python -m tools.check`: everything that has to hold before a change lands, one stage after the other."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

STAGES = {
    "lint": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "types": ("mypy",),
    "tests": ("pytest",),
    "discharge": ("tools.discharge", "--out", "out/discharge"),
    "mutants": ("tools.discharge", "--red", "--out", "out/red"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, stop at the first that fails; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.check", description=__doc__)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if none given"
    )
    chosen = parser.parse_args(arguments).stages or list(STAGES)
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]}; the stages are {', '.join(STAGES)}")
    for name in chosen:
        print(f"== {name}: python -m {' '.join(STAGES[name])}", flush=True)
        start = time.monotonic()
        status = subprocess.run([sys.executable, "-m", *STAGES[name]], check=False).returncode
        print(f"== {name}: exit {status} after {time.monotonic() - start:.0f} s", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
