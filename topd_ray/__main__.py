"""`python -m topd_ray` is `topd`."""

import sys

from topd_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
