"""Predictions for one image: classes, segmentation, depth, boxes, canopy height, zero-shot classes.

One file per task, each `predict_x(model, image, …)` → a result in the ORIGINAL image's geometry that can `save`
itself: data for the next step, and a drawing. Models come from `dinov3.hub` (published heads) or
`dinov3.hub.own_heads.load_head` (your own). Precision and device are the model's; nothing here casts.
"""
