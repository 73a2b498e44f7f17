"""Train FGDCN: `python -m projects.fgdcn.train [experiment=<name>] [data=<set>] [key=value ...]`."""

from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)

if __name__ == "__main__":
    command(train, __file__, "train")
