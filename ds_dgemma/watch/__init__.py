"""Who died and why: each rank watches the others."""
