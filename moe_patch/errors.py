"""The error of this package; its message names files, anchors and the commit, and says what to do."""


class PatchError(Exception):
    """The patch cannot be applied or taken back; nothing was changed."""
