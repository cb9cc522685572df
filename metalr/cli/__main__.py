"""`python -m metalr.cli`."""

from metalr.cli import main

if __name__ == "__main__":
    main()
