"""The parts of tools/app.py."""
