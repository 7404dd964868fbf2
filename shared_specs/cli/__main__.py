"""`python -m shared_specs.cli` is the `psa` command."""

import sys

from shared_specs.cli import main

sys.exit(main())
