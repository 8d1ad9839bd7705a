"""`python -m contextlora`, which torchrun needs."""

from contextlora.cli import main

main()
