"""`python -m serving.client`, or `python -m gemma_client` where the package is installed: the command line."""

from .command_line import main

main()
