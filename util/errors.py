"""The one exception for what a user can put right."""


class UserError(Exception):
    """Its message says what was wrong, where, and what to do; programs print it without a traceback."""
