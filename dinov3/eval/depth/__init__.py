"""Depth: the script that fits and scores heads of it, canopy heights included."""
