"""What a Trainer says of its run while it trains: speed, the loss on other data, and when to stop."""
