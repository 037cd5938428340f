"""DiffusionGemma's weights in one sweep."""
