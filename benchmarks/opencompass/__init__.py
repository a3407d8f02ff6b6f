"""HydraLoRA in OpenCompass: a configuration of MMLU and the class of model that it names."""
