"""A model, one pass through it, and the networks that timm lacks."""
