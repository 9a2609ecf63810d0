"""`python -m pithwood`, the same as the `pithwood` command."""

import sys

from pithwood.cli import main

sys.exit(main())
