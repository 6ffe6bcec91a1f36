"""`python -m avg_llava.cli` is `avg-llava`."""

import sys

from avg_llava.cli import main

sys.exit(main())
