"""The script that DSPex opens as a port: it finds the package `dspy_bridge` and runs it. No behaviour of its own.

The package lies in the checkout around this file, or in the folder `package` beside it (of a release, or a package from
Hex), or else is installed where the interpreter finds it.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))


def find_package() -> None:
    """Put the package on the path. A script of this name would otherwise find itself when it imports `dspy_bridge`."""
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder or os.getcwd()) != HERE]
    for folder in (CHECKOUT, os.path.join(HERE, "package")):
        if os.path.isfile(os.path.join(folder, "dspy_bridge", "__main__.py")):
            sys.path.insert(0, folder)
            break


class DSPyBridge:
    """DSPex's environment check looks for this name and the two below in the file."""

    def handle_command(self) -> int:
        """Serve until the end of input; returns the exit code."""
        find_package()
        try:
            from dspy_bridge.__main__ import main as serve
        except ImportError as error:
            sys.stderr.write(f"dspy_bridge: {error}; install the package for {sys.executable}\n")
            return 2
        return serve()


def main():
    """Run the peer."""
    return DSPyBridge().handle_command()


if __name__ == "__main__":
    sys.exit(main())
