"""What families of four stages share: each has maps of half the resolution of the one before."""
