"""`python -m omninorm` is `omninorm`."""

from omninorm.cli import main

if __name__ == "__main__":
    main()
