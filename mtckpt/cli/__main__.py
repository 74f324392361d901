"""``python -m mtckpt.cli``: the command where its script is not installed."""

from mtckpt.cli import main

if __name__ == "__main__":
    main(prog_name="mtckpt")
