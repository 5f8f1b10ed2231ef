"""`python -m mlm_train ...` is the `mlm-train` command; torchrun launches ranks this way."""

from mlm_train.cli import main

if __name__ == "__main__":
    main()
