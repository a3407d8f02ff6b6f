"""Training with parameters, gradients and optimizer split over processes by torch's `fully_shard` (FSDP2)."""
