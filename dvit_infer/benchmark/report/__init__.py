"""A result file as one page; draws what is in the rows and knows nothing of how they were measured."""
