"""Fine-tuning: a dense model becomes a dynamic one."""
