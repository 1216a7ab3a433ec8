"""`python -m open_lm`, the same as the console command `open-lm`."""

from open_lm.cli.main import main

if __name__ == "__main__":
    main()
