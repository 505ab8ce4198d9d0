"""Models written for, and read from, other programs."""
