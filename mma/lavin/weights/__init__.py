"""Base weights: Meta's LLaMA files and Vicuna's differences, as one folder that the model builder loads."""
