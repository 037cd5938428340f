"""What a run needs before it is started: memory, arithmetic and traffic, from the model's config.json and the run config."""
