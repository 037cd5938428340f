"""One optimizer step, and what to do when its numbers are bad."""
