"""``python -m ranksearch``: the command line, also where its script is not on the path."""

from ranksearch.cli import main

if __name__ == "__main__":
    main()
