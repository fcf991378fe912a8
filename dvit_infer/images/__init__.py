"""Image files: found, decoded, cut to a model's size, streamed; and what their classes are called."""
