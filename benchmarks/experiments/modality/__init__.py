"""MMA, LoRA and adapters without router on rows with and without an image (`README.md`)."""
