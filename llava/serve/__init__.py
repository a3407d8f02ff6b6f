"""Talking to a model: the conversation itself, and programs around it."""
