"""Seven ways of adapting one base to the NLVR mixture: LoRA, LoRA-split, HydraLoRA (see `README.md`)."""
