"""A trained model in other programs' formats, and back: transformers' own LLaVA (llava-hf) and upstream's folders."""
