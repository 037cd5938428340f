"""Several nodes, and runs that go on by themselves."""
