"""Conversations as the chat template of a tokenizer writes them, and the text of the tokens that answer."""
