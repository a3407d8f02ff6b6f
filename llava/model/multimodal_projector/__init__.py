"""Projectors: from vision features to the language model's width (upstream `multimodal_projector`)."""
