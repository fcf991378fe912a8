"""What every room uses: files, devices, tables, packages; imports nothing of ours but errors."""
