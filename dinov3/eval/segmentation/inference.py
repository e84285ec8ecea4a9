"""`make_inference` under the public import path; it lives with the heads, where predicting uses it as well."""

from dinov3.heads.encoder import DECODERS, MODES, WHOLE_SIZE, class_maps, make_inference, slide, windows

__all__ = ["DECODERS", "MODES", "WHOLE_SIZE", "class_maps", "make_inference", "slide", "windows"]
