"""What the method stands on and does not need to know of: see README.md in this folder."""
