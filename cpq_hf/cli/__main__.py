"""Run `cpq-hf` as `python -m cpq_hf.cli`."""

import sys

from . import main

sys.exit(main())
