"""Image files: finding, decoding, resizing and streaming; class names; input tensors."""
