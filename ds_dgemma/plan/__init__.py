"""What a run needs before it is started: memory, arithmetic and traffic, from the model's and the run's config."""
