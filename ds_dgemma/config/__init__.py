"""A run's settings: the schema by section, and how a file becomes one of it."""
