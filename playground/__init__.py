"""The embedded default: images, questions, a tokenizer and a small LLaVA, all made on the spot from one seed.

Nothing here is downloaded. `python -m playground.generate` builds it, `python -m playground.demo` fine-tunes it.
The package only calls `llava` and its extensions; it holds none of their logic.
"""
