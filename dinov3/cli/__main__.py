"""`python -m dinov3.cli` is the `dinov3` command."""

from dinov3.cli import main

main()
