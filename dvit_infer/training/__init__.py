"""Fine-tune a dense model into a dynamic one."""
