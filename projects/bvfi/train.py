"""Train BVFI: `python -m projects.bvfi.train [experiment=<name>] [data=<set>] [key=value ...]`."""

from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)

if __name__ == "__main__":
    command(train, __file__, "train")
