"""``python -m pentimento`` is the command line."""

from .cli import main

main()
