"""`python -m dinov3` is the `dinov3` command."""

from dinov3.cli import main

main()
