"""Weights in files: reading them without pickle, and whether a folder is whole and says what its model needs."""
