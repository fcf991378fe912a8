"""Measure candidates side by side: timing, result rows, comparison, roofline, report."""
