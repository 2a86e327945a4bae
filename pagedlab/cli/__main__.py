"""``python -m pagedlab.cli``."""

from pagedlab.cli import main

main()
