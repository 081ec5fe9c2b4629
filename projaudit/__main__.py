"""`python -m projaudit` is `projaudit`."""

from projaudit.cli import main

main()
