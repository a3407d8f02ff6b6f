"""A plan before the launch: memory, largest batch, operations and waits of a training command, without its weights."""
