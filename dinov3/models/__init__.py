"""Backbones: the table of architectures, one file per family, the protocol both meet."""
