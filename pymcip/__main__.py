"""Run the command line as `python -m pymcip`, also under torchrun."""

import sys

from pymcip.cli import main

if __name__ == "__main__":
    sys.exit(main())
