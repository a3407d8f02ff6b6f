"""Mixture-of-Modality Adaptation (LaVIN, NeurIPS 2023): re-parameterisable adapters mixed by a router on the modality.

`layer.py` holds the mathematics; the other files say how it enters a LLaVA.
"""
