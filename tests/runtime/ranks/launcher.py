"""A launcher to be killed: ``launcher.py FOLDER HOW``; its three ranks train for ever, or one fails HOW."""

import sys

from counterflow.runtime import launch
from runtime.processes import command

if __name__ == "__main__":
    launch(command("fail", *sys.argv[1:], "1f1b", 60), 3)
