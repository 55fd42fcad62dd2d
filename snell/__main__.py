"""``python -m snell`` and ``snell``: the command line. It needs the ``cli`` extra."""

import importlib.util
import sys


def main() -> None:
    """Run the command line, or exit with a message if click is missing."""
    if importlib.util.find_spec("click") is None:
        from snell.extras import hint

        sys.exit(f"snell's command line needs click: {hint('cli')}")
    from snell.cli import main

    main(prog_name="snell")


if __name__ == "__main__":
    main()
