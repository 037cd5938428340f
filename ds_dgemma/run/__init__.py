"""One run: its directory, what is checked before it starts, its steps, and what is done about bad ones."""
