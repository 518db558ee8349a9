"""The one class of errors that are meant for people."""


class UserError(ValueError):
  """What was asked for cannot be done.

  The message names the thing, its value and the remedy. Launch scripts print it without a
  traceback. Every other exception is a bug, or bad luck, and keeps its traceback.
  """


class MissingError(UserError):
  """A file, directory or data set that was named does not exist."""
