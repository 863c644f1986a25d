"""What the Python tests share."""
import os


def wanted(name):
    """Whether the test of that name is to be run: ONLY is not set, or is part of the name (see check.h)."""
    return os.environ.get("ONLY", "") in name
