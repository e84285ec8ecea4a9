"""A page in the browser over a store, a folder or one image: `dinov3 explore` serves it."""
