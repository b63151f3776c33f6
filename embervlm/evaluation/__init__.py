"""A checkpoint and a split become one JSON file."""
