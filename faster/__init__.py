"""The same bounds in less time, for relaxations.py and certify.py: see README.md in this folder."""
