"""Many images through one model: accuracy, predictions, pictures of what was kept."""
