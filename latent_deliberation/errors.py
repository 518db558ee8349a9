"""The errors that are meant for people. Every other exception is a bug or bad luck."""


class UserError(ValueError):
  """A request that cannot be met.

  The message names the thing, its value and the remedy, in that order. Launch scripts print it
  without a traceback. Every other exception keeps its traceback.
  """


class MissingError(UserError):
  """A file, directory or data set that was named does not exist."""
