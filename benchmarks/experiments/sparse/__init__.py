"""Does the learned predictor choose better than chance, or than attention scores? (see `README.md`)."""
