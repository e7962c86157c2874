"""`python -m rats`: the command line. The folder has no `__init__`, so that `rats` stays a namespace."""

from rats.stages.cli.main import main

if __name__ == "__main__":
    main()
