"""Many images through one model: accuracy, predictions, images of what was kept."""
