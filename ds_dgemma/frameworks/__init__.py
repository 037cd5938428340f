"""Models for evaluation frameworks, each in one file and each an extra."""
