"""State, step and input pipeline."""
