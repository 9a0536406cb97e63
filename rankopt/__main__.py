"""`python -m rankopt`: the command line, where the program `rankopt` is not on the path."""

import sys

from rankopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
