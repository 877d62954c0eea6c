"""The parts of tools/model_info.py."""
