"""How ranks are laid out, what they say to each other, and how they agree to stop."""
