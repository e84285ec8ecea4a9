"""A frozen, faster form of a backbone, chosen for the device, with its measured cosine to the plain model."""
