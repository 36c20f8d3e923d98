"""`python -m lightning_gradhealth.cli`, the same as `gradhealth`."""

import sys

from lightning_gradhealth.cli import main

if __name__ == "__main__":
    sys.exit(main())
