"""The commands of tools/prepare_data.py."""
