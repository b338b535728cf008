"""Runs a command unless a file exists: ``python unless.py FILE COMMAND ...``, the first start on an empty volume."""

import os
import sys

file, *command = sys.argv[1:]
if not os.path.exists(file):
    os.execvp(command[0], command)
