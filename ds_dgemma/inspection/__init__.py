"""What the model will see of the data."""
