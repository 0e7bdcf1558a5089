"""`python -m gatewright.cli` is the console script `gatewright`."""

import sys

from . import main

sys.exit(main())
