"""Conversations as the chat template of a tokenizer writes them."""
