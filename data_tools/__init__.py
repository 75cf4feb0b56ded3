"""From raw text to tokenised datasets: the command `megatrain-data`."""
