"""Test metrics and probes of the latents."""
