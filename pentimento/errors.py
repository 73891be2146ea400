"""The one kind of error that is the user's to mend: a config, a file, a picture, weights, memory."""


class UserError(Exception):
    """A mistake that the user can mend; the message names the field or file and says what to do.

    The command line prints it as one message and exits with code 2.
    """
