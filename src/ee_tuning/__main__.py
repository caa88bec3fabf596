"""``python -m ee_tuning`` is the command ``ee-tuning``."""

from ee_tuning.cli import main

if __name__ == "__main__":
    main()
