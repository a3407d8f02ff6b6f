"""The experiment on NLVR in LLaVA's format: a tiny base, LoRA and HydraLoRA on it (see `README.md`)."""
