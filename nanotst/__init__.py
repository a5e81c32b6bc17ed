"""What train.py stands on, one job a file. Nothing in here knows train.py."""


class UserError(Exception):
    """Something the user can act on, said in one line. Raised by libraries; an entry point prints it and
    exits with 1 (nanotst.configurator.run). Whatever else is raised is a bug, and gives its traceback."""
