"""`python -m collapse_probe`."""

from collapse_probe.cli import main

main()
