"""`python -m bayespot` is the command `bayespot`."""

from bayespot.cli import main

if __name__ == "__main__":
    main()
