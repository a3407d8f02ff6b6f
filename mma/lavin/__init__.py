"""What LaVIN's command lines consist of: their options, and what becomes of each in llava's training and evaluation."""
