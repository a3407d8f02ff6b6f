"""Formats of training data: every one is a `Rows`, whose rows have the form of LLaVA's data files."""
