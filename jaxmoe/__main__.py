"""`python -m jaxmoe`: the command `jaxmoe`."""

from __future__ import annotations

import sys

from jaxmoe.cli import main

sys.exit(main())
