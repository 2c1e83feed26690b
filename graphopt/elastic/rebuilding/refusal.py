"""Why a subnet is no model of the user's class."""


class NotRebuilt(Exception):
    """The class cannot say what the subnet is. The message goes on behind "because"."""
