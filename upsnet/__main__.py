"""python -m upsnet COMMAND …: the command `upsnet`."""

import sys

from upsnet.cli import main

sys.exit(main())
