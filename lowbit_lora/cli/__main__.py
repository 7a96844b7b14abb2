"""``python -m lowbit_lora.cli``: the command where it is not installed."""

import sys

from . import main

sys.exit(main())
