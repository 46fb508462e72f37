"""``python -m dreamloom`` is ``dreamloom``; launchers of several processes call it so."""

from dreamloom.cli.main import main

if __name__ == "__main__":
    main()
