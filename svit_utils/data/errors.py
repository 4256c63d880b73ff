"""What can be wrong with data on disk."""


class DataNotFoundError(FileNotFoundError):
    """A data set is neither there nor to be had; the message says where to put it and what was tried."""


class DamagedDataError(ValueError):
    """A file is there, but is not what it should be; the message names the file."""
