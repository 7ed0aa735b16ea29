"""Folders that cannot be written, for what is kept in the user's cache."""

import os

import pytest


def a_file(base):
    base.write_text("no folder")


def read_only(base):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    base.mkdir(mode=0o500)


def full(base):
    base.symlink_to("/proc/self")


NO_FOLDERS = (a_file, read_only, full)
