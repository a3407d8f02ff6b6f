"""MMA, LoRA and adapters without router on rows with and without a picture (`docs/experiments.md`)."""
