"""Run the command line with `python -m omninorm`."""

from omninorm.cli import main

if __name__ == "__main__":
    main()
