"""What a config will cost and whether it can run, worked out before anything is started. No torch."""
