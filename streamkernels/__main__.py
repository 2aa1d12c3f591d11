"""`python -m streamkernels` is `streamkernels`."""

import sys

from .cli import main

sys.exit(main())
