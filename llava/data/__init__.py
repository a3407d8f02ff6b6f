"""From a LLaVA data file to batches: rows, images, tokens, labels."""
