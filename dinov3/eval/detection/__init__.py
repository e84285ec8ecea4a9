"""Object detection: how good boxes are, and the script around it."""
