"""A rehearsal of a computation without the device and memory that it needs: fake tensors, counted bytes and waits."""
