"""Run one model on many images: accuracy, predictions, visualisation of kept patches."""
