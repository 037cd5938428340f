"""DeepSpeed: its config, the engine, experts on AutoEP, sharding, optimizers and their state."""
