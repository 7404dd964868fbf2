"""`python -m shared_specs.tools.cli` is the `psa` command."""

import sys

from shared_specs.tools.cli import main

sys.exit(main())
