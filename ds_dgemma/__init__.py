"""Fine-tune DiffusionGemma with DeepSpeed."""
