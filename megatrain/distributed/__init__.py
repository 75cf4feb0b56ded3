"""Who this process is among the ranks, and what it shares with them."""
