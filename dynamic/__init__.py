"""Dynamic-LLaVA (ICLR 2025): learned predictors that drop vision and text tokens from one decoder layer on.

`layer.py` holds the mathematics, `model.py` puts the predictors into a decoder, `extension.py` plugs them into llava.
"""
