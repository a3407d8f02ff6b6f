"""HydraLoRA and LoRA on a mixture of five text tasks that a program makes up (see `README.md`)."""
