"""Starting things on this machine or on a cluster: `python -m dinov3.run.submit`."""
