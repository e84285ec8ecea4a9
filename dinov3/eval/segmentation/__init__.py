"""Semantic segmentation: inference, and the scripts around it."""
